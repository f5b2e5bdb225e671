"""Let the compiler fuse reductions into the kernels that write or read what is measured."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tmm.core.metrics import COLUMN_SEPARATOR
from tmm.kernels.fused.choose_lowering import fused_row
from tmm.kernels.fused.row_partials import partials_of
from tmm.kernels.ops import summarize
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.fused_rows import set_fused
from tmm.passes.graph.provenance import copy_sites, sites_of
from tmm.passes.graph.readings import hinted_elements
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.slots import add_slots, take_slots
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.values import value_of
from tmm.passes.request import GraphRequest


def fuse_reductions(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Make partial sums, which are plain operations, of each operator where that costs less.

    Afterwards such a node holds partials of a tensor instead of its row; ``pack_rows`` merges all
    of them. Operators stay where the compiler could not fuse what they compute. Finds how each site
    is measured.
    """
    for node in list(module.graph.nodes):
        if node.target is summarize and not node.users:
            _fuse(node, request, found)
    for call, body in nested_calls(module):
        if returns_body_outputs(call):
            fuse_reductions(body, request, found)


def _fuse(node: Node, request: GraphRequest, found: GraphFindings) -> None:
    tensor, columns = node.args
    assert isinstance(tensor, Node)
    example = value_of(tensor)
    names = str(columns).split(COLUMN_SEPARATOR)
    fused = fused_row(example, names, hinted_elements(example), request.lowering)
    why = fused if isinstance(fused, str) else ""
    found.lowerings += [(*site, why) for site in sites_of(node)]
    if isinstance(fused, str):
        return
    rows, row = fused
    partials = Rewriter(node.graph, node).call(partials_of, tensor, *row.arguments(rows))
    set_fused(partials, row)
    add_slots(partials, *take_slots(node))
    copy_sites(node, partials)
    node.graph.erase_node(node)
