"""What the passes over one graph find out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch.fx import Node

from tmm.core.records import PackedLayout, Share, Site
from tmm.passes.graph.placed_edges import PlacedEnds
from tmm.passes.graph.sharding import Placements


@dataclass(frozen=True)
class ReferenceEnds:
    """Where the reference enters and leaves a graph.

    The extra inputs are the counterparts of the inputs at the positions ``parameters`` (what the
    model holds under names) and then ``inputs``. The extra outputs are those of the outputs at
    ``outputs``, and then, as they are afterwards, of the inputs at ``overwritten``. A graph that is
    a part of the model (``is_part``) also tells which outputs and overwritten inputs have none,
    with the reason, and why nothing can be compared after it, in ``end``. ``independent`` outputs
    depend on none of the extra inputs, ``constant`` ones on no tensor at all.
    """

    parameters: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    overwritten: tuple[int, ...] = ()
    is_part: bool = False
    lost_outputs: tuple[tuple[int, str], ...] = ()
    lost_inputs: tuple[tuple[int, str], ...] = ()
    end: str = ""
    independent: tuple[int, ...] = ()
    constant: tuple[int, ...] = ()

    @property
    def added(self) -> int:
        """The number of extra outputs."""
        return len(self.outputs) + len(self.overwritten)


Lowered: TypeAlias = tuple[str, Site, str]
"""Family and site of a row, and why an operator computes it; empty where the compiler fuses it."""


@dataclass(frozen=True)
class RowInput:
    """An extra input of a graph: after a backward pass, its gradient holds rows.

    It takes a tensor of ``length`` elements that requires a gradient.
    """

    device: torch.device
    length: int
    layout: PackedLayout


@dataclass
class GraphFindings:
    """What passes leave for those that come later, and for whoever runs the graph.

    ``unmeasured`` are the sites that were asked for and have no rows, with the reason.
    ``lowerings`` tell how each row is computed that the compiler might fuse. ``layout`` tells where
    the rows lie in the extra outputs, ``row_inputs`` and ``reference`` what further inputs and
    outputs there are. ``evaluations`` is how many calls of the model were left out as those of an
    evaluation. ``placements`` and ``gradient_shares`` tell what this rank has of marked tensors and
    of their gradients, where ranks share them, and ``placed_ends`` how they share what enters and
    leaves the graph.
    """

    unmeasured: list[tuple[Site, str]] = field(default_factory=list)
    lowerings: list[Lowered] = field(default_factory=list)
    evaluations: int = 0
    placements: Placements | None = None
    gradient_shares: Mapping[Node, Share] | None = None
    placed_ends: PlacedEnds = field(default_factory=PlacedEnds)
    reference: ReferenceEnds = field(default_factory=ReferenceEnds)
    row_inputs: tuple[RowInput, ...] = ()
    layout: PackedLayout = field(default_factory=lambda: PackedLayout((), 0, ()))
