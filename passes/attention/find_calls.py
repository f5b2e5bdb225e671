"""Find the attentions of a graph: calls of torch's functions, and those written out by hand."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

from tmm.kernels.ops import tap_attention
from tmm.passes.attention.flex_scores import FlexibleScores
from tmm.passes.attention.found import FoundAttention, Mask, Unmatched
from tmm.passes.attention.softmax_pattern import is_softmax, match_softmax
from tmm.passes.attention.unknown import Products
from tmm.passes.graph.dropout_functions import ATTENTIONS, bind
from tmm.passes.graph.provenance import all_nodes, sites_of
from tmm.passes.graph.values import value_of

MULTI_HEAD = functional.multi_head_attention_forward


def find_attention(module: GraphModule) -> Iterator[FoundAttention | Unmatched | Node]:
    """The attentions of a graph in order, without those of nested graphs.

    Calls of ``multi_head_attention_forward``, whose tensors are not in the graph, come as nodes.
    What looks like an attention and is none that is known comes last.
    """
    products = Products(module)
    known: set[Node] = set()
    for found in _find_known(module, products):
        known.add(found if isinstance(found, Node) else found.caller)
        yield found
    yield from products.unknown_attention(known)


def _find_known(
    module: GraphModule, products: Products
) -> Iterator[FoundAttention | Unmatched | Node]:
    for node in list(module.graph.nodes):
        if sites_of(node) or node.op not in ("call_function", "call_method"):
            continue
        if node.target in ATTENTIONS:
            yield _called(node)
        elif node.target is tap_attention:
            yield _shown(node)
        elif node.target is MULTI_HEAD:
            yield node
        elif node.target is torch.ops.higher_order.flex_attention:
            yield _flexible(module, node)
        elif "native_multi_head" in str(node.target) or "encoder_layer_fwd" in str(node.target):
            yield Unmatched(node, "torch's fused layer keeps its query and key to itself")
        elif is_softmax(node):
            may_be_one = any(source in products.made_of_product for source in node.all_input_nodes)
            written_out = match_softmax(module, node, may_be_one=may_be_one)
            if written_out is not None:
                yield written_out
        elif (name := _opaque(node)) is not None:
            yield Unmatched(node, f"computed by {name}, which is not known", is_numbered=False)


def _opaque(node: Node) -> str | None:
    """The name of an operation that is an attention as a whole, by what it is called."""
    name = str(getattr(node.target, "__name__", node.target))
    example = value_of(node)
    outputs = example if isinstance(example, (tuple, list)) else (example,)
    is_floating = isinstance(outputs[0], torch.Tensor) and outputs[0].is_floating_point()
    is_attention = "attention" in name or "attn" in name
    return name if is_floating and is_attention and "mask" not in name else None


def shows_attention(module: GraphModule) -> bool:
    """Whether the program shows an attention by a call, in this graph or one nested in it."""
    return any(node.target is tap_attention for node in all_nodes(module))


def _called(node: Node) -> FoundAttention | Unmatched:
    arguments = bind(node.target, node.args, node.kwargs)
    mask, causal = arguments.get("attn_mask"), arguments.get("is_causal", False)
    scale = arguments.get("scale")
    if not isinstance(causal, bool) or not isinstance(scale, (int, float, type(None))):
        return Unmatched(node, "its is_causal= or scale= is known only when it runs")
    masks = (Mask.of(mask),) if isinstance(mask, Node) else ()
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    return FoundAttention(node, node, query, key, value, node, masks, causal, scale)


def _shown(node: Node) -> FoundAttention:
    query, key, mask, causal, scale, *_ = node.args
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    masks = (Mask.of(mask),) if isinstance(mask, Node) else ()
    return FoundAttention(node, node, query, key, key, None, masks, bool(causal), scale)  # type: ignore[arg-type]


def _flexible(module: GraphModule, node: Node) -> FoundAttention | Unmatched:
    query, key, value, score, blocks, scale, _, score_tensors, mask_tensors = node.args
    assert isinstance(blocks, tuple)
    score_mod, mask_mod = (getattr(module, str(part.target)) for part in (score, blocks[-1]))  # type: ignore[union-attr]
    tensors = (*score_tensors, *mask_tensors)  # type: ignore[misc]
    if not isinstance(scale, float) or not all(isinstance(tensor, Node) for tensor in tensors):
        return Unmatched(node, "flex_attention with numbers that are known only when it runs")
    first = [user for user in node.users if user.target is operator.getitem and user.args[1] == 0]
    scores = FlexibleScores(score_mod, mask_mod, len(score_tensors), len(mask_tensors))  # type: ignore[arg-type]
    return FoundAttention(
        *(node, node, query, key, value, first[0] if first else None),  # type: ignore[arg-type]
        scale=scale,
        scores=scores,
        tensors=tensors,
    )
