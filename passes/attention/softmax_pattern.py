"""Attention written out by hand: softmax(q k^T) v, followed back from the softmax.

What is not understood is said, rather than guessed: in-place operations on the logits, dimensions
that are regrouped, products that do not weigh values.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

from tmm.kernels.attention.attention_call import forbidden_up_to
from tmm.passes.attention.filled_scores import FilledMask, FilledScores
from tmm.passes.attention.found import FoundAttention, Mask, MaskKind, Unmatched, hide_by_themselves
from tmm.passes.graph.edits import storages
from tmm.passes.graph.mutation import overwritten_by
from tmm.passes.graph.provenance import sites_of
from tmm.passes.graph.values import value_of

_PRODUCTS = (torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm", "__matmul__")
_ADDITIONS = (torch.add, operator.add, operator.iadd, "add", "add_")
_MULTIPLICATIONS = (torch.mul, operator.mul, operator.imul, "mul", "mul_")
_DIVISIONS = (torch.div, torch.true_divide, operator.truediv, operator.itruediv, "div", "div_")
_FILLS = (torch.masked_fill, "masked_fill", "masked_fill_")
_CONVERSIONS = (
    *("to", "type", "float", "half", "bfloat16", "double", "type_as", "contiguous", "detach"),
)
_RESHAPES = ("view", "reshape")
_SOFTMAXES = (functional.softmax, torch.softmax, torch.special.softmax, "softmax")
_LOGARITHMS = (
    *(functional.log_softmax, torch.log_softmax, torch.special.log_softmax, "log_softmax"),
)
_EXPONENTIALS = (torch.exp, "exp")
_DROPOUTS = (functional.dropout, torch.dropout)


class _UnknownError(Exception):
    """Logits are computed in a way that is not understood; says which.

    ``is_product`` tells that they come from a product all the same.
    """

    def __init__(self, reason: str, *, is_product: bool = False) -> None:
        super().__init__(reason)
        self.is_product = is_product


@dataclass(frozen=True)
class _Logits:
    """What logits were computed from, as far as they were followed back.

    ``chain`` are the nodes that compute them and the constants that were read, ``is_divided`` tells
    that batch and heads, one dimension of the product, were taken apart.
    """

    product: Node
    masks: tuple[Mask, ...] = ()
    scale: float = 1.0
    chain: tuple[Node, ...] = ()
    is_divided: bool = False


def is_softmax(node: Node) -> bool:
    """Whether a node gives the softmax of any dimension, be it as ``exp`` of its logarithm."""
    if node.target in _EXPONENTIALS:
        return _inner(node).target in _LOGARITHMS
    return node.target in _SOFTMAXES


def _inner(node: Node) -> Node:
    """The softmax of a node, or its logarithm, where the logits go in."""
    source = _argument(node, 0, "input")
    return source if node.target in _EXPONENTIALS and isinstance(source, Node) else node


def match_softmax(
    module: GraphModule, softmax: Node, *, may_be_one: bool = True
) -> FoundAttention | Unmatched | None:
    """The attention that a softmax is a part of; None if it is none.

    Unless it ``may_be_one``, logits that are not understood are those of something else.
    """
    probabilities = value_of(softmax)
    source = _argument(_inner(softmax), 0, "input")
    weighing = _weighs(softmax)
    if not isinstance(source, Node) or not isinstance(probabilities, torch.Tensor):
        return None
    is_product = weighing is not None and may_be_one
    try:
        logits = _follow(source)
        is_product = weighing is not None or _example(_factors(logits.product)[1]).dim() > 2
        return _match(module, softmax, logits, weighing) if is_product else None
    except _UnknownError as error:
        if not is_product and not error.is_product:
            return None  # some other softmax, as of a classifier or a router
        return Unmatched(softmax, f"written out by hand; {error}")


def _match(
    module: GraphModule, softmax: Node, logits: _Logits, weighing: Node | None
) -> FoundAttention | Unmatched | None:
    probabilities, product = value_of(softmax), logits.product
    if probabilities.dim() < 3:
        return None
    if _argument(_inner(softmax), 1, "dim") not in (-1, probabilities.dim() - 1):
        raise _UnknownError("its softmax is not over the last dimension")
    if weighing is None:
        raise _UnknownError("what it weighs is not known")
    if probabilities.dim() != 4:
        raise _UnknownError("which dimension has the heads is not known")
    if not logits.is_divided and _example(product).shape != probabilities.shape:
        raise _UnknownError("its heads are not those of the product of query and key")
    query, key = _factors(product)
    value = _operand(weighing, 1)
    if _example(key).dim() < 3:
        raise _UnknownError("all heads have the same keys")
    _refuse_overwritten(module, logits, (query, key), softmax)
    heads = int(probabilities.shape[1]) if logits.is_divided else None
    found = FoundAttention(
        *(product, softmax, query, key, value, weighing),
        masks=logits.masks,
        scale=logits.scale,
        key_is_turned=True,
        heads=heads,
    )
    if hide_by_themselves(logits.masks):
        return found
    filled = tuple(
        FilledMask(mask.kind, mask.value, heads if mask.has_joined_heads else None)
        for mask in logits.masks
    )
    dtypes = [_example(mask.tensor).dtype for mask in logits.masks]
    hidden_up_to = max(forbidden_up_to(d) for d in (*dtypes, torch.float64) if d.is_floating_point)
    return replace(
        found,
        masks=(),
        scores=FilledScores(filled, hidden_up_to),
        tensors=tuple(mask.tensor for mask in logits.masks),
    )


def _factors(product: Node) -> tuple[Node, Node]:
    """Query and key."""
    first = 1 if product.target is torch.baddbmm else 0
    return _operand(product, first), _operand(product, first + 1)


def _refuse_overwritten(
    module: GraphModule, logits: _Logits, factors: tuple[Node, ...], softmax: Node
) -> None:
    """What is in the graph need not be what was computed, where something is written in place."""
    read = (*factors, *(mask.tensor for mask in logits.masks))
    memory, chain = storages((*read, *logits.chain, logits.product)), set(logits.chain)
    own = storages((*logits.chain, logits.product))
    for node in module.graph.nodes:
        target = overwritten_by(node)
        if target is None or node in chain or not node < softmax or sites_of(node):
            continue
        written = storages([target])
        if written & own or (written & memory and logits.product < node):
            raise _UnknownError("its tensors are overwritten")


def _weighs(node: Node) -> Node | None:
    """The product in which the probabilities ``node`` weigh values, if there is one."""
    for user in node.users:
        if sites_of(user) or _argument(user, 0, "input") is not node:
            continue
        if user.target in _PRODUCTS:
            return user
        passes_on = (*_DROPOUTS, *_CONVERSIONS, *_MULTIPLICATIONS, torch.nan_to_num, "nan_to_num")
        passes = user.target in passes_on or _keeps_rows(user)
        if passes and (found := _weighs(user)) is not None:
            return found
    return None


def _keeps_rows(node: Node) -> bool:
    """Whether a node regroups the leading dimensions only."""
    if node.target not in _RESHAPES:
        return False
    before, after = value_of(node.all_input_nodes[0]), value_of(node)
    return bool(before.shape[-2:] == after.shape[-2:])


def _follow(node: Node) -> _Logits:
    """Follow logits back to the product of query and key."""
    for targets, step in _STEPS:
        if node.target in targets:
            logits = step(node)
            return replace(logits, chain=(*logits.chain, node))
    name, is_einsum = getattr(node.target, "__name__", node.target), node.target is torch.einsum
    raise _UnknownError(f"its logits pass {name}, which is not known", is_product=is_einsum)


def _product(node: Node) -> _Logits:
    return _Logits(node)


def _sum_with_product(node: Node) -> _Logits:
    mask = _operand(node, 0)
    beta, alpha = (_number(node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    if beta not in (0, 1) or alpha is None:
        raise _UnknownError("its logits are added to with a factor")
    joined = _example(mask).dim() == 3 and _example(mask).shape[0] != 1
    masks = (Mask(mask, "added", joined),) if beta else ()
    return _Logits(node, masks, alpha)


def _conversion(node: Node) -> _Logits:
    if not _example(node).is_floating_point():
        raise _UnknownError("its logits are rounded")
    return _follow(_operand(node, 0))


def _reshape(node: Node) -> _Logits:
    """Batch and heads may be taken apart, and nothing else."""
    source = _operand(node, 0)
    before, after = _example(source), _example(node)
    if before.dim() != 3 or after.dim() != 4 or not _keeps_rows(node):
        raise _UnknownError("its logits are regrouped")
    logits = _follow(source)
    if _example(logits.product).shape != before.shape:
        raise _UnknownError("its logits are regrouped")
    return replace(logits, is_divided=True)


def _addition(node: Node) -> _Logits:
    left, right = _argument(node, 0, "input"), _argument(node, 1, "other")
    if node.kwargs.get("alpha", 1) != 1 or not isinstance(left, Node):
        raise _UnknownError("its logits are added to with a factor")
    if not isinstance(right, Node):
        raise _UnknownError("a number is added to its logits")
    followed = [(mask, _try_to_follow(logits)) for logits, mask in ((left, right), (right, left))]
    found = [(mask, logits) for mask, logits in followed if isinstance(logits, _Logits)]
    if len(found) > 1:
        raise _UnknownError("two products are added")
    if not found:
        reasons = [logits for _, logits in followed if isinstance(logits, str)]
        raise _UnknownError(reasons[0])
    ((mask, logits),) = found
    if _example(mask).dtype == torch.bool:
        raise _UnknownError("a boolean is added to its logits")
    return _with_mask(logits, mask, "added")


def _try_to_follow(node: Node) -> _Logits | str:
    try:
        return _follow(node)
    except _UnknownError as error:
        return str(error)


def _with_mask(logits: _Logits, mask: Node, kind: MaskKind, value: float = -math.inf) -> _Logits:
    example = _example(mask)
    joined = not logits.is_divided and _example(logits.product).dim() == 3
    if example.dim() > _example(logits.product).dim() + logits.is_divided:
        raise _UnknownError("a mask has more dimensions than its logits")
    joined = joined and example.dim() == 3 and example.shape[0] != 1
    return replace(logits, masks=(*logits.masks, Mask(mask, kind, joined, value)))


def _multiplication(node: Node) -> _Logits:
    left, right = _argument(node, 0, "input"), _argument(node, 1, "other")
    for logits, factor in ((left, right), (right, left)):
        number = _number(factor)
        if number is not None and isinstance(logits, Node):
            return _scaled(logits, factor, number)
    raise _UnknownError("its logits are multiplied by a tensor")


def _division(node: Node) -> _Logits:
    logits, divisor = _argument(node, 0, "input"), _argument(node, 1, "other")
    number = _number(divisor)
    if not number or not isinstance(logits, Node) or node.kwargs.get("rounding_mode"):
        raise _UnknownError("its logits are divided by a tensor")
    return _scaled(logits, divisor, 1 / number)


def _scaled(node: Node, factor: Any, number: float) -> _Logits:
    logits = _follow(node)
    if any(mask.kind == "added" for mask in logits.masks) and number != 1:
        raise _UnknownError("its logits are scaled after a mask was added")
    constants = (factor,) if isinstance(factor, Node) else ()
    masks = tuple(replace(mask, value=mask.value * number) for mask in logits.masks)
    return replace(
        logits, scale=logits.scale * number, masks=masks, chain=(*logits.chain, *constants)
    )


def _fill(node: Node) -> _Logits:
    mask, value = _argument(node, 1, "mask"), _argument(node, 2, "value")
    return _forbid(_argument(node, 0, "input"), mask, value, "forbidden")


def _choice(node: Node) -> _Logits:
    allowed = _argument(node, 0, "condition")
    chosen, other = _argument(node, 1, "input"), _argument(node, 2, "other")
    if _number(other) is not None:
        return _forbid(chosen, allowed, other, "allowed")
    return _forbid(other, allowed, chosen, "forbidden")


def _forbid(logits: Any, mask: Any, value: Any, kind: MaskKind) -> _Logits:
    number = _number(value)
    if number is None:
        raise _UnknownError("its logits are replaced by something else than a number")
    if not isinstance(logits, Node) or not isinstance(mask, Node):
        raise _UnknownError("its logits are replaced where no tensor says")
    followed = _with_mask(_follow(logits), mask, kind, number)
    constants = (value,) if isinstance(value, Node) else ()
    return replace(followed, chain=(*followed.chain, *constants))


Step: TypeAlias = Callable[[Node], _Logits]

_STEPS: tuple[tuple[tuple[object, ...], Step], ...] = (
    (_PRODUCTS, _product),
    ((torch.baddbmm,), _sum_with_product),
    (_CONVERSIONS, _conversion),
    (_RESHAPES, _reshape),
    (_ADDITIONS, _addition),
    (_MULTIPLICATIONS, _multiplication),
    (_DIVISIONS, _division),
    (_FILLS, _fill),
    ((torch.where,), _choice),
)


_NAMES = {
    "other": ("other", "mat2", "tensor2"),
    "input": ("input", "self", "batch1"),
}


def _argument(node: Node, index: int, name: str) -> Any:
    """An argument of a call, by position or by name."""
    if len(node.args) > index:
        return node.args[index]
    return next((node.kwargs[n] for n in _NAMES.get(name, (name,)) if n in node.kwargs), None)


def _operand(node: Node, index: int) -> Node:
    """A tensor that an operation takes."""
    names = ("input", "batch1", "batch2") if node.target is torch.baddbmm else ("input", "other")
    found = _argument(node, index, names[index])
    if not isinstance(found, Node):
        raise _UnknownError("one of its operands is not a tensor of the graph")
    return found


def _example(node: Node) -> torch.Tensor:
    example = value_of(node)
    if not isinstance(example, torch.Tensor):
        raise _UnknownError("its logits come from no tensor")
    return example


def _number(value: Any) -> float | None:
    """The number that a constant is, also one that a graph makes a tensor of."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Node):
        return None
    if value.target is torch.full and _argument(value, 0, "size") in ([], (), torch.Size([])):
        return _number(_argument(value, 1, "fill_value"))
    if value.target is torch.tensor or value.target in _CONVERSIONS:
        return _number(_argument(value, 0, "data"))
    return None
