"""Remove the marks whose rows would keep alive what a compiler drops."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tmm.core.records import Site
from tmm.kernels.ops import tap_value
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.dead_draws import marks_of_dead_draws
from tmm.passes.graph.taps import site_of
from tmm.passes.graph.values import value_of
from tmm.passes.request import GraphRequest

REASON = (
    "nothing uses the random numbers that it depends on: the compiled program leaves them out, and"
    " the measured one would draw them"
)


def remove_dead_marks(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Erase each mark of a tensor that depends on random numbers which nothing else depends on.

    Afterwards no measurement brings a draw back that the program without them does without. Finds
    the sites that were asked for, with the reason. It is for a graph that a compiler makes
    smaller, not for one that runs as it stands.
    """
    for graph, mark in marks_of_dead_draws(module):
        if (site := _wanted(mark, request)) is not None:
            found.unmeasured.append((site, REASON))
        (tensor, *_) = mark.all_input_nodes
        mark.replace_all_uses_with(tensor)
        graph.graph.erase_node(mark)


def _wanted(mark: Node, request: GraphRequest) -> Site | None:
    if mark.target is tap_value:
        return Site(str(mark.args[1]))
    site = site_of(mark, request.modules)
    if site is None:
        return None
    dtype = value_of(mark.all_input_nodes[0]).dtype
    compared = None if request.comparison is None else request.comparison.select
    further = request.select_further.values()
    selects = (request.select, *further, request.select_gradient, compared)
    return site if any(select and select(site, dtype) for select in selects) else None
