"""Find the attentions of a graph: calls of torch's functions, and those written out by hand."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

from tmm.passes.edits import storages
from tmm.passes.flexible_scores import FlexibleScores
from tmm.passes.mutation import overwritten_by
from tmm.passes.origin import sites_of
from tmm.passes.shared_masks import bind

MaskKind: TypeAlias = Literal["added", "allowed", "forbidden"]
"""What a mask means: added to the logits, or a boolean that is true where a key may be seen or not.
"""

ATTENTION = functional.scaled_dot_product_attention
MULTI_HEAD = functional.multi_head_attention_forward

_PRODUCTS = (torch.matmul, torch.bmm, operator.matmul)
_PRODUCT_METHODS = ("matmul", "bmm", "__matmul__")
_ADDITIONS = (torch.add, operator.add, operator.iadd)
_MULTIPLICATIONS = (torch.mul, operator.mul, operator.imul)
_DIVISIONS = (torch.div, torch.true_divide, operator.truediv, operator.itruediv)
_CONVERSIONS = (
    "to",
    "type",
    "float",
    "half",
    "bfloat16",
    "double",
    "type_as",
    "contiguous",
    "detach",
)
_DROPOUTS = (functional.dropout, torch.dropout)
_FORBIDDING = -9999.0  # models write -inf, finfo.min or -10000


@dataclass(frozen=True)
class Mask:
    """One of the masks of an attention."""

    tensor: Node
    kind: MaskKind


@dataclass(frozen=True)
class FoundAttention:
    """An attention in a graph.

    ``caller`` is the node whose module called it; after ``position`` all of its tensors are known.
    ``key`` is of shape (..., keys, channels), or with the last two the other way round. ``heads``
    is the number of heads where tensors have batch and heads in one dimension. ``scores`` is what
    ``flex_attention`` makes of the logits, with further ``tensors``.
    """

    caller: Node
    position: Node
    query: Node
    key: Node
    value: Node
    output: Node | None
    masks: tuple[Mask, ...] = ()
    is_causal: bool = False
    scale: float | None = None
    key_is_turned: bool = False
    heads: int | None = None
    scores: FlexibleScores | None = None
    tensors: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Unmatched:
    """What looks like an attention, and why its statistics are not known."""

    caller: Node
    reason: str


def find_attention(module: GraphModule) -> Iterator[FoundAttention | Unmatched | Node]:
    """The attentions of a graph in order, without those of nested graphs.

    Calls of ``multi_head_attention_forward``, whose tensors are not in the graph, come as nodes.
    """
    for node in list(module.graph.nodes):
        if sites_of(node) or node.op not in ("call_function", "call_method"):
            continue
        if node.target is ATTENTION:
            yield _called(node)
        elif node.target is MULTI_HEAD:
            yield node
        elif node.target is torch.ops.higher_order.flex_attention:
            yield _flexible(module, node)
        elif "native_multi_head" in str(node.target) or "encoder_layer_fwd" in str(node.target):
            yield Unmatched(node, "torch's fused layer keeps its query and key to itself")
        elif _is_softmax(node) and (product := _weighs(node)) is not None:
            yield _written_out(module, node, product)


def _called(node: Node) -> FoundAttention | Unmatched:
    arguments = bind(node.target, node.args, node.kwargs)
    mask, causal = arguments.get("attn_mask"), arguments.get("is_causal", False)
    scale = arguments.get("scale")
    if not isinstance(causal, bool) or not isinstance(scale, (int, float, type(None))):
        return Unmatched(node, "its is_causal= or scale= is known only when it runs")
    masks: tuple[Mask, ...] = ()
    if isinstance(mask, Node):
        is_boolean = mask.meta["example_value"].dtype == torch.bool
        masks = (Mask(mask, "allowed" if is_boolean else "added"),)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    return FoundAttention(node, node, query, key, value, node, masks, causal, scale)


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


def _is_softmax(node: Node) -> bool:
    if node.target not in (functional.softmax, torch.softmax, "softmax"):
        return False
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    example = node.meta.get("example_value")
    return isinstance(example, torch.Tensor) and dim in (-1, example.dim() - 1)


def _weighs(node: Node) -> Node | None:
    """The product in which the probabilities ``node`` weigh values, if there is one."""
    for user in node.users:
        if sites_of(user):
            continue
        if _is_product(user) and user.args[0] is node:
            return user
        passes_on = user.target in (*_DROPOUTS, *_CONVERSIONS) or _is_reshape(user)
        if passes_on and user.args[0] is node and (found := _weighs(user)) is not None:
            return found
    return None


def _is_product(node: Node) -> bool:
    return node.target in (*_PRODUCTS, *_PRODUCT_METHODS)


def _is_reshape(node: Node) -> bool:
    """Whether a node divides or joins the leading dimensions only."""
    if node.target not in ("view", "reshape"):
        return False
    before, after = node.all_input_nodes[0].meta["example_value"], node.meta["example_value"]
    return bool(before.shape[-2:] == after.shape[-2:])


@dataclass(frozen=True)
class _Logits:
    """What logits were computed from, as far as it was followed back."""

    product: Node
    masks: tuple[Mask, ...] = ()
    scale: float = 1.0


def _overwrites(module: GraphModule, nodes: list[Node], first: Node, last: Node) -> bool:
    """Whether any of ``nodes`` is written to between the two."""
    between = (node for node in module.graph.nodes if first < node < last)
    written = [target for node in between if (target := overwritten_by(node)) is not None]
    return bool(storages(written) & storages(nodes))


Step: TypeAlias = Callable[[Node], _Logits | str]


def _written_out(module: GraphModule, softmax: Node, weighing: Node) -> FoundAttention | Unmatched:
    source = softmax.args[0] if softmax.args else softmax.kwargs["input"]
    assert isinstance(source, Node)
    logits = _follow(source)
    if isinstance(logits, str):
        return Unmatched(softmax, f"written out by hand; {logits}")
    query, key = logits.product.args[:2]
    value = weighing.args[1]
    if logits.product.target is torch.baddbmm:
        query, key = logits.product.args[1:3]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    probabilities, joined = softmax.meta["example_value"], query.meta["example_value"].dim() == 3
    if probabilities.dim() != 4:
        return Unmatched(softmax, "written out by hand; which dimension has the heads is not known")
    nodes = [query, key, *(mask.tensor for mask in logits.masks)]
    if _overwrites(module, nodes, logits.product, softmax):
        return Unmatched(softmax, "written out by hand; its tensors are overwritten")
    return FoundAttention(
        *(logits.product, softmax, query, key, value, weighing),
        masks=logits.masks,
        scale=logits.scale,
        key_is_turned=True,
        heads=int(probabilities.shape[1]) if joined else None,
    )


def _follow(node: Node) -> _Logits | str:
    """Follow logits back to the product of query and key; or why that is not possible."""
    if _is_product(node):
        return _Logits(node)
    if node.target is torch.baddbmm:
        return _follow_baddbmm(node)
    if node.target in _CONVERSIONS or _is_reshape(node):
        return _follow_first(node)
    steps: tuple[tuple[tuple[object, ...], Step], ...] = (
        ((*_ADDITIONS, "add", "add_"), _follow_addition),
        ((*_MULTIPLICATIONS, "mul", "mul_"), _follow_multiplication),
        ((*_DIVISIONS, "div", "div_"), _follow_division),
        ((torch.masked_fill, "masked_fill", "masked_fill_"), _follow_fill),
        ((torch.where,), _follow_where),
    )
    for targets, step in steps:
        if node.target in targets:
            return step(node)
    name = getattr(node.target, "__name__", node.target)
    return f"its logits pass {name}, which is not known"


def _follow_first(node: Node) -> _Logits | str:
    source = node.args[0]
    return _follow(source) if isinstance(source, Node) else "its logits come from no tensor"


def _follow_addition(node: Node) -> _Logits | str:
    left, right = node.args[:2]
    if node.kwargs.get("alpha", 1) != 1 or not isinstance(left, Node):
        return "its logits are added to with a factor"
    for logits, mask in ((left, right), (right, left)):
        if isinstance(logits, Node) and isinstance(mask, Node):
            followed = _follow(logits)
            if not isinstance(followed, str):
                kind: MaskKind = "added"
                if mask.meta["example_value"].dtype == torch.bool:
                    return "a boolean is added to its logits"
                return replace(followed, masks=(*followed.masks, Mask(mask, kind)))
    return "no product of a query and a key was found in its logits"


def _follow_multiplication(node: Node) -> _Logits | str:
    for logits, factor in (node.args[:2], node.args[1::-1]):
        number = _number(factor)
        if number is not None and isinstance(logits, Node):
            return _scaled(logits, number)
    return "its logits are multiplied by a tensor"


def _follow_division(node: Node) -> _Logits | str:
    logits, divisor = node.args[:2]
    number = _number(divisor)
    if not number or not isinstance(logits, Node):
        return "its logits are divided by a tensor"
    return _scaled(logits, 1 / number)


def _scaled(logits: Node, factor: float) -> _Logits | str:
    followed = _follow(logits)
    if isinstance(followed, str):
        return followed
    if any(mask.kind == "added" for mask in followed.masks) and factor != 1:
        return "its logits are scaled after a mask was added"
    return replace(followed, scale=followed.scale * factor)


def _follow_fill(node: Node) -> _Logits | str:
    logits, mask, value = (*node.args, node.kwargs.get("value"))[:3]
    return _forbid(logits, mask, value, "forbidden")


def _follow_where(node: Node) -> _Logits | str:
    allowed, logits, value = (*node.args, None)[:3]
    followed = _forbid(logits, allowed, value, "allowed")
    if isinstance(followed, str):
        return _forbid(value, allowed, logits, "forbidden")
    return followed


def _forbid(logits: Any, mask: Any, value: Any, kind: MaskKind) -> _Logits | str:
    number = _number(value)
    if number is None or number > _FORBIDDING:
        return "its logits are replaced by something else than a large negative number"
    if not isinstance(logits, Node) or not isinstance(mask, Node):
        return "its logits are replaced where no tensor says"
    followed = _follow(logits)
    if isinstance(followed, str):
        return followed
    return replace(followed, masks=(*followed.masks, Mask(mask, kind)))


def _follow_baddbmm(node: Node) -> _Logits | str:
    mask = node.args[0]
    beta, alpha = _number(node.kwargs.get("beta", 1)), _number(node.kwargs.get("alpha", 1))
    if beta not in (0, 1) or alpha is None or not isinstance(mask, Node):
        return "its logits are added to with a factor"
    masks = (Mask(mask, "added"),) if beta else ()
    return _Logits(node, masks, alpha)


def _number(value: Any) -> float | None:
    """The number that a constant is, also one that a graph makes a tensor of."""
    if isinstance(value, (int, float)):
        return float(value)
    if isinstance(value, Node) and value.target is torch.full and not list(value.args[0]):  # type: ignore[arg-type]
        return _number(value.args[1])
    if isinstance(value, Node) and value.target is torch.tensor:
        return _number(value.args[0])
    if isinstance(value, Node) and value.target in _CONVERSIONS:
        return _number(value.args[0])
    return None
