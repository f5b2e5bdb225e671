"""How ranks hold a real tensor that is no ``DTensor``, as the graph of autograd tells.

What has left a ``DTensor`` by ``to_local`` stands in its node there. What a measured graph has
given back gets a note there, since the passes know it. A tensor that is passed on as it is keeps
its node; wrappers of modules add nodes that change nothing, which are looked through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from tmm.core.torch_private import placements_before_local
from tmm.passes.graph.sharding import Placed

_NOTE = "tmm_placed"

_SAME = frozenset({"CloneBackward0", "AliasBackward0", "ToCopyBackward0"})
"""Nodes whose result has the elements of their operand."""

_PASSED_ON = "RegisterPostBackwardFunctionBackward"
"""The node by which ``fully_shard`` hears of a backward pass: it hands on all of its tensors."""


@dataclass(frozen=True)
class PlacedEdge:
    """How ranks hold a tensor, and its gradient; None for what is not known."""

    tensor: Placed | None = None
    gradient: Placed | None = None


@dataclass(frozen=True)
class PlacedEnds:
    """How ranks hold what enters and leaves a graph, as far as it is known.

    ``inputs`` are what its placements follow from, by position; ``outputs`` stand in order.
    """

    inputs: tuple[tuple[int, Placed], ...] = ()
    outputs: tuple[PlacedEdge, ...] = ()

    def hold_for(self, inputs: tuple[object, ...]) -> bool:
        """Whether the inputs of a call are placed as the placements of the graph take for given."""
        return all(_placed(inputs[place]) == placed for place, placed in self.inputs)

    def note(self, outputs: tuple[object, ...]) -> None:
        """Remember of the outputs of a call how they are placed."""
        for output, edge in zip(outputs if self.outputs else (), self.outputs, strict=True):
            if edge.tensor is None or not isinstance(output, torch.Tensor):
                continue
            node: Any = output.grad_fn
            if node is not None:
                node.metadata.setdefault(_NOTE, {})[output.output_nr] = edge


def placed_edge(tensor: torch.Tensor) -> PlacedEdge:
    """How ranks hold a tensor outside of graphs, and its gradient."""
    if (placed := Placed.of(tensor)) is not None:
        return PlacedEdge(placed, placed.of_gradient())
    node: Any = tensor.grad_fn
    place, is_itself = tensor.output_nr, True
    while node is not None:
        edge: PlacedEdge | None = node.metadata.get(_NOTE, {}).get(place)
        if (left := placements_before_local(node)) is not None:
            mesh, placements, given = left
            placed = Placed(mesh, placements)
            of_gradient = placed.of_gradient() if given is None else Placed(mesh, given)
            edge = PlacedEdge(placed, of_gradient)
        if edge is not None:
            return edge if is_itself else PlacedEdge(edge.tensor)
        if node.name() == _PASSED_ON:
            node, place = node.next_functions[place]
        elif node.name() in _SAME:
            ((node, place),) = node.next_functions
        else:
            break
        is_itself = False
    return PlacedEdge()


def _placed(tensor: object) -> Placed | None:
    return placed_edge(tensor).tensor if isinstance(tensor, torch.Tensor) else None
