"""In which dimension the result of an operation is split among ranks, where its operands are.

Of an operation that never mixes what lies at different places of one dimension, each rank makes the
part of the result that belongs to its part of the operands. This holds whatever other operands a
rank has, if these have nothing in that dimension: rotary embeddings, masks and scales, say.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch.fx import Node

from tmm.passes.graph.dropout_functions import random_function
from tmm.passes.graph.known_functions import name_of
from tmm.passes.graph.sharding import shape_of
from tmm.passes.graph.values import value_of

Split: TypeAlias = Mapping[Node, int]
"""The dimension of each operand that ranks have parts of."""

_Rule: TypeAlias = Callable[[Node, Split, Collection[Node]], int | None]


def split_dimension(
    node: Node, split: Split, others: Collection[Node], *, is_pointwise: bool
) -> int | None:
    """The dimension in which the result of ``node`` is split; None if that is not known.

    Of a result that is several tensors it is that of each. ``others`` are the operands that no rank
    is known to have a part of. An operation is told by its name, so ``node`` is to call a function
    of torch, or a method.
    """
    if is_pointwise:
        return _pointwise(node, split, others)
    rule = _RULES.get(name_of(node))
    return None if rule is None else rule(node, split, others)


def _pointwise(node: Node, split: Split, others: Collection[Node]) -> int | None:
    after = shape_of(node)
    places = {len(after) - len(shape_of(operand)) + place for operand, place in split.items()}
    if len(places) != 1:
        return None
    (place,) = places
    if any(shape_of(operand)[own] != after[place] for operand, own in split.items()):
        return None
    return place if _have_nothing(others, len(after) - place) else None


def _have_nothing(others: Collection[Node], from_the_end: int) -> bool:
    """Whether tensors are the same at all places of a dimension, counted from the last one."""
    shapes = map(shape_of, others)
    return all(
        len(shape) < from_the_end or shape[len(shape) - from_the_end] == "1" for shape in shapes
    )


def _only(split: Split, others: Collection[Node]) -> tuple[tuple[str, ...], int] | None:
    """Shape and dimension of the one tensor operand."""
    if len(split) != 1 or others:
        return None
    ((operand, place),) = split.items()
    return shape_of(operand), place


def _argument(node: Node, position: int, name: str) -> Any:
    return node.args[position] if position < len(node.args) else node.kwargs.get(name)


def _dimensions(
    node: Node, position: int, name: str, rank: int, default: int | None = None
) -> list[int] | None:
    """The dimensions that an argument names; None if it does not, or not by numbers."""
    given = _argument(node, position, name)
    if given is None and "axis" not in node.kwargs:
        given = default
    listed = list(given) if isinstance(given, (tuple, list)) else [given]
    if not listed or not all(isinstance(one, int) for one in listed):
        return None
    return [one % rank for one in listed]


# Views


def _view(node: Node, split: Split, others: Collection[Node]) -> int | None:
    """The outermost of the dimensions that one is cut into, or that are joined to one."""
    if (only := _only(split, others)) is None:
        return None
    (before, place), after = only, shape_of(node)
    if before[:place] == after[:place] and place < len(after):
        return None if before[place] != after[place] and _size_is_left_open(node, place) else place
    behind = len(before) - place
    return len(after) - behind if before[place:] == after[-behind:] else None


def _size_is_left_open(node: Node, place: int) -> bool:
    """Whether a view has -1 behind a place: then what is there is as large on one process."""
    given = node.args[1] if len(node.args) == 2 else node.args[1:]
    if name_of(node) == "unflatten":
        given, place = _argument(node, 2, "sizes"), 0
    sizes = given if isinstance(given, (tuple, list)) else ()
    return -1 in sizes[place + 1 :]


def _transpose(node: Node, split: Split, others: Collection[Node]) -> int | None:
    if (only := _only(split, others)) is None:
        return None
    before, place = only
    first, second = (_dimensions(node, at, f"dim{at - 1}", len(before)) for at in (1, 2))
    if first is None or second is None:
        return None
    return {first[0]: second[0], second[0]: first[0]}.get(place, place)


def _permute(node: Node, split: Split, others: Collection[Node]) -> int | None:
    if (only := _only(split, others)) is None:
        return None
    before, place = only
    given = node.args[1:] if len(node.args) > 2 else _argument(node, 1, "dims")
    if not isinstance(given, (tuple, list)) or not all(isinstance(one, int) for one in given):
        return None
    order = [one % len(before) for one in given if isinstance(one, int)]
    return order.index(place) if place in order else None


def _unsqueeze(node: Node, split: Split, others: Collection[Node]) -> int | None:
    only, after = _only(split, others), shape_of(node)
    added = _dimensions(node, 1, "dim", len(after))
    if only is None or added is None:
        return None
    return only[1] + (added[0] <= only[1])


def _squeeze(node: Node, split: Split, others: Collection[Node]) -> int | None:
    if (only := _only(split, others)) is None:
        return None
    before, place = only
    removed = _dimensions(node, 1, "dim", len(before))
    if removed is None or place in removed:
        return None
    return place - sum(one < place and before[one] == "1" for one in removed)


def _expand(node: Node, split: Split, others: Collection[Node]) -> int | None:
    if (only := _only(split, others)) is None:
        return None
    (before, place), after = only, shape_of(node)
    found = len(after) - len(before) + place
    return found if before[place] == after[found] else None


def _complex(node: Node, split: Split, others: Collection[Node]) -> int | None:
    """Numbers of two parts, which are the last dimension, or have been."""
    only = _only(split, others)
    return only[1] if only is not None and only[1] < len(shape_of(node)) else None


def _getitem(node: Node, split: Split, others: Collection[Node]) -> int | None:
    if (only := _only(split, others)) is None:
        return None
    before, place = only
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    taken = sum(one is not None and one is not Ellipsis for one in index)
    own = found = 0
    for one in index:
        if one is None:
            found += 1
            continue
        if one is Ellipsis:
            skipped = len(before) - taken
            if own <= place < own + skipped:
                return found + place - own
            own, found = own + skipped, found + skipped
            continue
        is_slice = isinstance(one, slice)
        if not is_slice and not isinstance(one, int):
            return None
        if own == place:
            return found if isinstance(one, slice) and _is_all(one, before[place]) else None
        own, found = own + 1, found + is_slice
    return found + place - own


def _is_all(taken: slice, size: str) -> bool:
    start, stop, step = taken.start, taken.stop, taken.step
    return start in (None, 0) and step in (None, 1) and (stop is None or str(stop) == size)


def _along_others(position: int, name: str = "dim", default: int | None = None) -> _Rule:
    """Something happens along the dimensions that an argument names: to others than the split."""

    def rule(node: Node, split: Split, others: Collection[Node]) -> int | None:
        if (only := _only(split, others)) is None:
            return None
        before, place = only
        named = _dimensions(node, position, name, len(before), default)
        if named is None or place in named:
            return None
        value = value_of(node)
        is_smaller = isinstance(value, torch.Tensor) and len(value.shape) < len(before)
        is_smaller = is_smaller or name_of(node) == "unbind"
        return place - (sum(one < place for one in named) if is_smaller else 0)

    return rule


def _cat(node: Node, split: Split, others: Collection[Node]) -> int | None:
    """Joined along another dimension, or along one that is new."""
    places, along = set(split.values()), _dimensions(node, 1, "dim", len(shape_of(node)), 0)
    if others or len(places) != 1 or along is None:
        return None
    (place,) = places
    if name_of(node) == "stack":
        return place + (along[0] <= place)
    return None if place in along else place


def _repeat_interleave(node: Node, split: Split, others: Collection[Node]) -> int | None:
    """Each place so many times, one after the other: heads of keys for groups of queries."""
    only = _only(split, others)
    along = _argument(node, 2, "dim")
    is_counted = isinstance(_argument(node, 1, "repeats"), int)
    return only[1] if only is not None and is_counted and isinstance(along, int) else None


# What computes with several places of other dimensions


def _normalized(node: Node, split: Split, others: Collection[Node]) -> int | None:
    """Over the last dimensions, with a weight and a bias that have these alone."""
    if len(split) != 1 or node.args[0] not in split:
        return None
    ((operand, place),) = split.items()
    shape = _argument(node, 1, "normalized_shape")
    count = len(shape) if isinstance(shape, (tuple, list)) else 0
    return place if 0 < count < len(shape_of(operand)) - place else None


def _triangle(node: Node, split: Split, others: Collection[Node]) -> int | None:
    only = _only(split, others)
    return only[1] if only is not None and only[1] < len(only[0]) - 2 else None


def _linear(node: Node, split: Split, others: Collection[Node]) -> int | None:
    if len(split) != 1 or node.args[0] not in split:
        return None
    ((operand, place),) = split.items()
    return place if place < len(shape_of(operand)) - 1 else None


def _matmul(node: Node, split: Split, others: Collection[Node]) -> int | None:
    """Of matrices one beside the other, or of rows of the first operand."""
    first, after = node.args[0], shape_of(node)
    from_the_end = {len(shape_of(operand)) - place for operand, place in split.items()}
    if len(from_the_end) != 1 or len(node.all_input_nodes) != 2:
        return None
    (behind,) = from_the_end
    if behind > 2:
        return len(after) - behind if _have_nothing(others, behind) else None
    is_rows = behind == 2 and len(split) == 1 and first in split
    if not is_rows or any(len(shape_of(other)) < 2 for other in others):
        return None
    return len(after) - 2


def _attention(node: Node, split: Split, others: Collection[Node]) -> int | None:
    """Heads, or items of a batch, whose masks are the same for all."""
    query = node.args[:3]
    if len(query) != 3 or any(one not in split for one in query) or len(split) != len(set(query)):
        return None
    places, ranks = set(split.values()), {len(shape_of(operand)) for operand in split}
    if len(places) != 1 or ranks != {4} or random_function(node.target, node.args, node.kwargs):
        return None
    (place,) = places
    return place if place < 2 and _have_nothing(others, 4 - place) else None


_RULES: Mapping[str, _Rule] = MappingProxyType(
    dict.fromkeys(("view", "reshape", "unflatten", "flatten"), _view)
    | dict.fromkeys(("transpose", "swapaxes", "swapdims"), _transpose)
    | {"permute": _permute, "unsqueeze": _unsqueeze, "squeeze": _squeeze, "expand": _expand}
    | dict.fromkeys(("view_as_complex", "view_as_real"), _complex)
    | {"getitem": _getitem, "repeat_interleave": _repeat_interleave}
    | dict.fromkeys(("cat", "concat", "stack"), _cat)
    | dict.fromkeys(("mean", "sum", "amax", "amin", "var", "std", "softmax"), _along_others(1))
    | dict.fromkeys(("log_softmax", "cumsum", "narrow", "select"), _along_others(1))
    | dict.fromkeys(("chunk", "split", "tensor_split"), _along_others(2, default=0))
    | {"unbind": _along_others(1, default=0), "normalize": _along_others(2, default=1)}
    | dict.fromkeys(("layer_norm", "rms_norm"), _normalized)
    | dict.fromkeys(("tril", "triu"), _triangle)
    | dict.fromkeys(("matmul", "bmm"), _matmul)
    | {"linear": _linear, "scaled_dot_product_attention": _attention}
)
"""What each operation does with the dimension that its operands are split in."""
