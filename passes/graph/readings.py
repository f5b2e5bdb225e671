"""How much a rewritten graph reads once more, to measure it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch.fx import GraphModule, Node

from tmm.kernels.ops import REDUCTIONS, summarize_into
from tmm.kernels.summarize.many import summarize_many
from tmm.passes.graph.provenance import all_nodes
from tmm.passes.graph.values import local_example, value_of
from tmm.passes.metrics.gradient_probe import probe


def hinted_elements(example: torch.Tensor) -> int:
    """Elements of a traced tensor; dynamic dimensions have the size that they had in the trace."""
    elements = 1
    for size in (local_example(example) if example.is_nested else example).shape:
        hint = size.node.hint if isinstance(size, torch.SymInt) else size
        elements *= int(hint or 0)
    return elements


def readings(module: GraphModule) -> tuple[int, ...]:
    """Elements of each tensor that is reduced to a row, in the order of the graph."""
    return tuple(
        hinted_elements(value_of(tensor))
        for node in all_nodes(module)
        for tensor in _reduced(node)
        if isinstance(tensor, Node)
    )


def _reduced(node: Node) -> Sequence[object]:
    """The tensors that a node reads once more, to reduce them."""
    if node.target is summarize_into:
        return node.args[2:3]
    if node.target is summarize_many:
        return cast("Sequence[object]", node.args[0])
    if node.target is probe:
        fused = cast("Sequence[object]", node.args[3])
        return () if all(isinstance(how, tuple) for how in fused) else node.args[:1]
    return node.args[:1] if node.target in REDUCTIONS else ()
