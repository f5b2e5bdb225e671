"""Graphs inside graphs: bodies of higher-order operators such as activation checkpointing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node


def nested_calls(module: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """Each node of ``module`` that calls a graph of its own, with that graph, in order."""
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        for argument in node.all_input_nodes:
            if argument.op == "get_attr":
                body = getattr(module, str(argument.target), None)
                if isinstance(body, GraphModule):
                    yield node, body


def returns_body_outputs(node: Node) -> bool:
    """Whether the call gives back the tuple that its body returns, run once and in order."""
    return node.target is torch.ops.higher_order.tag_activation_checkpoint
