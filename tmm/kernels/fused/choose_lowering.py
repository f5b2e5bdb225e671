"""Which tensors are reduced by operations that a compiler fuses, and which by an operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypeAlias, TypeVar

import torch

from tmm.kernels.build import DTYPES
from tmm.kernels.fused.row_partials import HALF, SHORT_ROW, FusedRow, Rows

Item = TypeVar("Item")

Lowering: TypeAlias = Literal["auto", "fused", "operator"]

SHORT = 128
"""Elements of a row below which it is joined with its neighbours, where these are whole rows of the
next dimension: partials take memory, too."""

LONG = 1 << 14
"""Elements of a long row and of those that are joined with it, where nothing needs it alone."""

_MANY = 1024  # rows that keep a GPU busy
_SHORTEST = 32
_FEW = 4096  # elements of a tensor whose rows may be shorter
_LONGEST = 1 << 18  # of a row: a vocabulary has no more
_PIECE = 4096  # elements of a row of a tensor that has but one

SMALL = 1 << 15
"""Elements of a tensor of which, on a CPU, a call takes longer than reading it."""

TOGETHER = "small: one operator reads several of them"
"""How such a tensor is reduced."""

WAITING = 1 << 18
"""Elements of tensors that wait to be reduced together: they are in a cache, and kept."""


def in_groups(items: Iterable[Item], elements: Callable[[Item], int]) -> Iterator[list[Item]]:
    """What waits for one another, in its order; the last of a group makes it ``WAITING`` or more.

    ``elements`` tells how many an item has.
    """
    group: list[Item] = []
    waiting = 0
    for item in items:
        group.append(item)
        waiting += elements(item)
        if waiting >= WAITING:
            yield group
            group, waiting = [], 0
    if group:
        yield group


def fused_row(
    example: torch.Tensor,
    columns: Sequence[str],
    elements: int,
    lowering: Lowering,
    *,
    is_free: bool = False,
) -> tuple[Rows, FusedRow] | str:
    """How the row of a tensor is fused; or why it is not, in a few words.

    ``elements`` are those that it had when it was traced. No size is asked for that may change: a
    graph would be compiled anew for another one. With ``is_free`` no kernel of the program takes
    the tensor row by row.
    """
    if lowering == "operator":
        return "as lowering= asks for"
    is_wide = example.device.type == "cpu"
    if lowering == "auto" and is_wide:
        is_small = elements <= SMALL and example.dtype in DTYPES and not example.is_nested
        return TOGETHER if is_small else "large: on a CPU an operator reads it faster"
    if example.dtype not in (torch.float32, *HALF):
        return f"its dtype is {str(example.dtype).removeprefix('torch.')}"
    rows = rows_of(example, is_free=is_free and not is_wide)
    if isinstance(rows, str):
        return rows
    if not is_wide and "moment4" in columns and rows.length > SHORT_ROW:
        return "fourth moments of long rows take several readings"
    return rows, FusedRow(tuple(columns), rows.length, is_wide, example.dtype in HALF)


def rows_of(example: torch.Tensor, *, is_free: bool = False) -> Rows | str:
    """The rows of a tensor in the order of its memory, or why it has none.

    With ``is_free`` long ones are joined with their neighbours.
    """
    if example.layout is not torch.strided or example.is_nested:
        return "it has no strides"
    sizes = [_known(size) for size in example.shape]
    strides = [_known(stride) for stride in example.stride()]
    if 0 in sizes:
        return "it has no elements"
    hints = [_hint(stride) for stride in example.stride()]
    order = sorted(range(example.dim()), key=lambda place: -hints[place])
    order.sort(key=lambda place: sizes[place] != 1)  # those of one element first
    length = dense = 1
    for place in reversed(order):
        size = sizes[place]
        if size == 1:
            break
        if size is None or strides[place] != dense:
            break
        if length == dense and length < SHORT and (length == 1 or length * size <= SHORT_ROW):
            length *= size
        dense *= size
    elements = _product(sizes)
    is_large = elements is None or elements > _FEW
    if is_large and (length < _SHORTEST or length == elements):
        length = next((n for n in range(_PIECE, SHORT, -1) if dense % n == 0), length)
        if length < _SHORTEST:
            return f"its rows are {length} elements long"
    if is_free and SHORT_ROW < length <= LONG:
        most = min(LONG // length, dense // (length * _MANY))
        length *= next((n for n in range(most, 1, -1) if dense // length % n == 0), 1)
    if length > _LONGEST or (length == elements and length > _PIECE):
        return f"it is one row of {length} elements"
    return Rows(tuple(order), length)


def _known(size: int | torch.SymInt) -> int | None:
    """A size that cannot change."""
    return size if isinstance(size, int) else None


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint or 0) if isinstance(size, torch.SymInt) else size


def _product(sizes: Sequence[int | None]) -> int | None:
    product = 1
    for size in sizes:
        if size is None:
            return None
        product *= size
    return product
