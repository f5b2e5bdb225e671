"""The masks of what drops elements at random, handed out by the live program."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from tmm.core.torch_private import FakeTensor
from tmm.passes.graph.dropout_functions import (
    SharedMask,
    attention_with_mask,
    multi_head_attention_with_mask,
    shared_mask,
)
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.values import forget_value, has_value, set_value, value_of
from tmm.passes.reference.prefix_branch import Samples


class Masks:
    """The masks of what drops elements at random, shared by all copies."""

    def __init__(self) -> None:
        self._masks: dict[Node, tuple[Node, SharedMask]] = {}

    def of(self, module: GraphModule, node: Node) -> tuple[Node, SharedMask] | None:
        """The mask that ``node`` drops with; has it handed out first."""
        if node in self._masks:
            return self._masks[node]
        shared = shared_mask(node)
        if shared is None:
            return None
        arguments = cast("dict[str, Argument]", dict(shared.arguments))
        with module.graph.inserting_before(node):
            both = module.graph.call_function(shared.with_mask, (), arguments)
            mask = module.graph.call_function(operator.getitem, (both, 1))
        both.meta = dict(node.meta)
        forget_value(both)
        # The node itself stays, so that whoever knows it still does.
        node.target, node.args, node.kwargs = operator.getitem, (both, 0), {}
        self._masks[node] = (mask, shared)
        return self._masks[node]

    def narrowed(self, module: GraphModule, mask: Node, samples: Samples) -> Node:
        """The part of a mask that is of these items."""
        if not has_value(mask):
            _describe(mask)
        if not samples.has_items(value_of(mask)):
            return mask
        return samples.insert_narrow(Rewriter(module.graph, mask), mask)


def _describe(mask: Node) -> None:
    """The shape of a mask; not by computing it, which fixes sizes before torch 2.13."""
    (both,) = mask.all_input_nodes
    given: Any = map_arg(both.kwargs, lambda node: cast("Argument", value_of(node)))
    fake_mode = next(value.fake_mode for value in given.values() if isinstance(value, FakeTensor))
    with fake_mode, torch.no_grad():
        if both.target is attention_with_mask:
            query, key = given["query"], given["key"]
            example = query.new_empty((*query.shape[:-1], key.shape[-2]))
        elif both.target is multi_head_attention_with_mask:
            example = given["query"].new_empty(_shape_of_multi_head(given))
        else:
            example = torch.empty_like(given["input"])
    set_value(mask, example)


def _shape_of_multi_head(given: Any) -> tuple[Any, ...]:
    """Of the probabilities in ``multi_head_attention_forward``, whose inputs are sequence-first."""
    query, key, heads = given["query"], given["key"], given["num_heads"]
    batch = query.shape[1] if query.dim() == 3 else 1
    further = int(given.get("bias_k") is not None) + int(bool(given.get("add_zero_attn")))
    sizes = query.shape[0], key.shape[0] + further
    together = given.get("need_weights", True)
    return (batch * heads, *sizes) if together else (batch, heads, *sizes)
