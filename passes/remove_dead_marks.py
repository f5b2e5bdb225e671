"""Remove the marks whose rows would keep alive what a compiler drops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from tmm.layout import Site
from tmm.metrics import Reduction
from tmm.operators import tap_value
from tmm.passes.dead_draws import marks_of_dead_draws
from tmm.passes.marks import site_of
from tmm.passes.values import value_of

REASON = (
    "nothing uses the random numbers that it depends on: the compiled program leaves them out, and"
    " the measured one would draw them"
)


@dataclass(frozen=True)
class DeadMarkOptions:
    """Whose marks ``remove_dead_marks`` reports.

    ``modules`` gives the relative name of each module by its ``id``; what one of ``selects`` gives
    a reduction for was asked for.
    """

    modules: Mapping[int, str]
    selects: Sequence[Callable[[Site, torch.dtype], tuple[Reduction, ...]]]


def remove_dead_marks(
    module: GraphModule, *, options: DeadMarkOptions
) -> tuple[tuple[Site, str], ...]:
    """Erase each mark of a tensor that depends on random numbers which nothing else depends on.

    Afterwards no measurement brings a draw back that the program without them does without. Returns
    the sites that were asked for, with the reason.
    """
    refused = []
    for graph, mark in marks_of_dead_draws(module):
        if (site := _wanted(mark, options)) is not None:
            refused.append((site, REASON))
        (tensor, *_) = mark.all_input_nodes
        mark.replace_all_uses_with(tensor)
        graph.graph.erase_node(mark)
    return tuple(refused)


def _wanted(mark: Node, options: DeadMarkOptions) -> Site | None:
    if mark.target is tap_value:
        return Site(str(mark.args[1]))
    site = site_of(mark, options.modules)
    if site is None:
        return None
    dtype = value_of(mark.all_input_nodes[0]).dtype
    return site if any(select(site, dtype) for select in options.selects) else None
