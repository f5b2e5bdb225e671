"""How much a rewritten graph reads once more, to measure it."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from tmm.passes.graph.provenance import all_nodes
from tmm.passes.graph.values import value_of
from tmm.passes.metrics.gradient_probe import probe


def hinted_elements(example: torch.Tensor) -> int:
    """Elements of a traced tensor; dynamic dimensions have the size that they had in the trace."""
    elements = 1
    for size in example.shape:
        hint = size.node.hint if isinstance(size, torch.SymInt) else size
        elements *= int(hint or 0)
    return elements


def readings(module: GraphModule) -> tuple[int, ...]:
    """Elements of each tensor that is reduced to a row, in the order of the graph."""
    return tuple(
        hinted_elements(value_of(node.args[0]))
        for node in all_nodes(module)
        if _reduces(node) and isinstance(node.args[0], Node)
    )


def _reduces(node: Node) -> bool:
    return node.target is probe or str(node.target).startswith("tmm.summarize")
