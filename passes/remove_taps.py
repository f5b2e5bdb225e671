"""Remove the marks that tracing left."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from tmm.operators import MARKS
from tmm.passes.nesting import nested_calls


def remove_taps(module: GraphModule) -> int:
    """Erase every tap, also in nested graphs; users of a tap use what it marked.

    Returns the number of taps erased.
    """
    erased = 0
    for target in MARKS:
        for node in module.graph.find_nodes(op="call_function", target=target):
            tensor = node.args[0]
            assert isinstance(tensor, Node)
            node.replace_all_uses_with(tensor)
            module.graph.erase_node(node)
            erased += 1
    return erased + sum(remove_taps(body) for _, body in nested_calls(module))
