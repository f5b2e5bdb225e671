"""Copy a graph before it is rewritten."""

from __future__ import annotations

import copy

from torch.fx import GraphModule

from tmm.core.torch_private import keep_sources
from tmm.passes.graph.subgraphs import nested_calls


def copy_graph(module: GraphModule) -> GraphModule:
    """A copy of ``module`` whose graph, and graphs nested in it, can be rewritten.

    Dynamo keeps using the graph that it hands to a backend, so rewriting starts with a copy.
    Parameters, buffers and constants are shared with the original; node metadata is kept.
    """
    copied = GraphModule(module, copy.deepcopy(module.graph), type(module).__name__)
    copied.meta = dict(module.meta)
    keep_sources(module, copied)
    for call, body in list(nested_calls(copied)):
        for argument in call.all_input_nodes:
            if argument.op == "get_attr" and getattr(copied, str(argument.target)) is body:
                setattr(copied, str(argument.target), copy_graph(body))
    return copied
