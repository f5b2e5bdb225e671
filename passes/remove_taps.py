"""Remove the marks that tracing left."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tmm.kernels.ops import MARKS
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.subgraphs import nested_calls
from tmm.passes.request import GraphRequest


def remove_taps(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Erase every tap, also in nested graphs; users of a tap use what it marked."""
    for target in MARKS:
        for node in module.graph.find_nodes(op="call_function", target=target):
            tensor = node.args[0]
            assert isinstance(tensor, Node)
            node.replace_all_uses_with(tensor)
            module.graph.erase_node(node)
    for _, body in nested_calls(module):
        remove_taps(body, request, found)
