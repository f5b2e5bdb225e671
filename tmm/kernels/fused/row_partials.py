"""Partial sums of each run of neighbouring elements, by an operator that Inductor fuses.

A tensor is taken as rows in the order of its memory. Each row becomes a few numbers, the
*partials*; ``tmm.kernels.fused.merge_operator`` makes the row of the whole tensor of them. While a
graph is traced it is one operator, as each operation costs some milliseconds there.

Inductor computes in float32 what it fuses, and rounds nothing in between. What overflows to
infinity or is rounded to zero where it is stored in half precision would be counted as neither: the
partials are of the values as memory would hold them, whether they are stored or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tmm.core.fusion_private import Lowered, fuse_operator
from tmm.core.metrics import COLUMN_SEPARATOR, TENSOR_COLUMNS

PARTIALS = (
    "centre",
    "unit",
    "power1",
    "power2",
    "power3",
    "power4",
    "sum",
    "sum_squares",
    "sum_absolute",
    "absmax",
    "minimum",
    "maximum",
    "zeros",
    "nans",
    "infinities",
    "spread",
)
"""What is computed of a row of elements. ``centre`` is their mean, rounded, and ``power1`` to
``power4`` are sums of powers of the deviation from it, in units of ``unit``, 1 where there is none.
``spread`` is ``power2`` of a row in half precision, which needs no ``power1``: such elements are
equal, or differ by more than a centre is rounded by.
"""

HALF = (torch.float16, torch.bfloat16)
SHORT_ROW = 1024
"""Elements of a row that a GPU keeps in its registers."""


@dataclass(frozen=True)
class Rows:
    """How a tensor is taken as rows in the order of its memory.

    Attributes:
        order: Its dimensions, from the one with the largest stride to the innermost one.
        length: Elements of a row.
    """

    order: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class FusedRow:
    """The columns of a row, and how they come about.

    Attributes:
        columns: Names from ``TENSOR_COLUMNS``, in that order.
        length: Elements of a row that partials are computed of.
        is_wide: Whether partials are float64. Of float32 values, their sums neither overflow nor
            round then, but for the last digits. GPUs compute in float32.
        is_half: Whether the elements are in half precision.
    """

    columns: tuple[str, ...]
    length: int
    is_wide: bool
    is_half: bool = False

    def arguments(self, rows: Rows) -> tuple[list[int], int, str, bool]:
        """What ``partials_of`` takes besides the tensor."""
        return list(rows.order), self.length, COLUMN_SEPARATOR.join(self.partials), self.is_wide

    @property
    def dtype(self) -> torch.dtype:
        """That of the partials."""
        return torch.float64 if self.is_wide else torch.float32

    @property
    def width(self) -> int:
        """Numbers of the row that partials become."""
        return len(self.columns)

    @property
    def partials(self) -> tuple[str, ...]:
        """What is computed of each row, in the order of the partials' first dimension."""
        needed = set(self.columns) - {"count", "mean", "moment2", "moment3", "moment4"}
        if "mean" in self.columns:
            # Longer rows do not stay in registers: the mean of a part of one may be infinite.
            is_short = self.length <= SHORT_ROW and "moment4" not in self.columns
            has_spread = self.is_half and is_short and not self.is_wide
            needed |= {"centre", "spread" if has_spread else "power2"}
            needed -= {"sum"}
            if "absmax" in self.columns:  # which tells infinities, as the moments do not
                needed -= {"sum_squares"}
            if not self.is_wide and not has_spread:
                needed |= {"power1"}  # the centre's rounding
            if "moment4" in self.columns:
                needed |= {"power3", "power4"}
                if not self.is_wide:
                    needed |= {"unit"}  # fourth powers leave the range of float32 soon
        return tuple(name for name in PARTIALS if name in needed)

    @property
    def layout(self) -> list[int]:
        """As ``tmm::merge`` takes it: the length, partials, columns, and how many of each."""
        partials = [PARTIALS.index(name) for name in self.partials]
        columns = [TENSOR_COLUMNS.index(name) for name in self.columns]
        return [self.length, len(partials), *partials, len(columns), *columns]


class Plain:
    """The operations of ``Lowered``, on tensors."""

    @staticmethod
    def apply(function: Callable[..., Any], *arguments: Any) -> Any:
        """An operator of ATen."""
        return function(*arguments)

    @staticmethod
    def sizes(x: torch.Tensor) -> list[int]:
        """Those of its dimensions."""
        return list(x.shape)

    @staticmethod
    def as_stored(x: torch.Tensor) -> torch.Tensor:
        """The values in float32."""
        return x.float()

    @staticmethod
    def reading(x: torch.Tensor) -> torch.Tensor:
        """``x``."""
        return x

    rows_apart = reading

    @staticmethod
    def mean_and_spread(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the last dimension: the mean, and the sum of squares of the deviations from it."""
        mean = x.mean(-1)
        return mean, (x - mean.unsqueeze(-1)).square().sum(-1)

    @staticmethod
    def join(parts: list[torch.Tensor]) -> torch.Tensor:
        """One after the other and flat."""
        return torch.cat([part.flatten() for part in parts])


On: TypeAlias = type[Plain] | type[Lowered]


def _partials(
    on: On, x: Any, order: Sequence[int], length: int, partials: str, is_wide: bool
) -> Any:
    names = partials.split(COLUMN_SEPARATOR)
    rows = _rows(on, on.apply(_aten.permute.default, on.reading(x), list(order)), length)
    if "spread" in names:
        rows = on.rows_apart(rows)
    values = on.as_stored(rows)
    if is_wide:
        values = on.apply(_convert, values, torch.float64)
    each = _each(on, values, names)
    return on.apply(_aten.reshape.default, on.join(each), [len(each), -1])


def _rows(on: On, x: Any, length: int) -> Any:
    """``x`` as rows: its last dimensions, or a piece of them, are the last one.

    The others stay as they are: what else reads the tensor goes through them, and Inductor fuses
    loops that look alike.
    """
    sizes, last = on.sizes(x), 1
    while sizes and last < length:
        last *= sizes.pop()
    leading = sizes or [1]
    return on.apply(_aten.reshape.default, x, [*(leading if last == length else [-1]), length])


def _each(on: On, values: Any, partials: Sequence[str]) -> list[Any]:
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32

    def total(per_element: Any) -> Any:
        return on.apply(_aten.sum.dim_IntList, per_element, [-1])

    def number(is_so: Any) -> Any:
        return total(on.apply(_convert, is_so, dtype))

    made: dict[str, Any] = {}
    if "spread" not in partials and "centre" in partials:
        made |= _powers(on, values, partials, total)
    magnitudes = on.apply(_aten.abs.default, values)
    plain: dict[str, Callable[[], Any]] = {
        "sum": lambda: total(values),
        "sum_squares": lambda: total(on.apply(_aten.mul.Tensor, values, values)),
        "sum_absolute": lambda: total(magnitudes),
        "absmax": lambda: on.apply(_aten.amax.default, magnitudes, [-1]),
        "minimum": lambda: on.apply(_aten.amin.default, values, [-1]),
        "maximum": lambda: on.apply(_aten.amax.default, values, [-1]),
        "zeros": lambda: number(on.apply(_aten.eq.Scalar, values, 0)),
        "nans": lambda: number(on.apply(_aten.isnan.default, values)),
        "infinities": lambda: number(on.apply(_aten.isinf.default, values)),
    }
    made |= {name: plain[name]() for name in partials if name in plain}
    if "spread" in partials:  # last: in the other order one kernel of a GPT spilled registers
        made["centre"], made["spread"] = on.mean_and_spread(values)
    return [made[name] for name in partials]


def _powers(
    on: On, values: Any, partials: Sequence[str], total: Callable[[Any], Any]
) -> dict[str, Any]:
    centre = on.apply(_aten.mean.dim, values, [-1])
    deviation = on.apply(_aten.sub.Tensor, values, on.apply(_aten.unsqueeze.default, centre, -1))
    made = {"centre": centre}
    if "unit" in partials:
        largest = on.apply(_aten.amax.default, on.apply(_aten.abs.default, deviation), [-1])
        is_constant = on.apply(_convert, on.apply(_aten.eq.Scalar, largest, 0), torch.float32)
        made["unit"] = on.apply(_aten.add.Tensor, largest, is_constant)
        unit = on.apply(_aten.unsqueeze.default, made["unit"], -1)
        deviation = on.apply(_aten.div.Tensor, deviation, unit)
    square = on.apply(_aten.mul.Tensor, deviation, deviation)
    powers: dict[str, Callable[[], Any]] = {
        "power1": lambda: deviation,
        "power2": lambda: square,
        "power3": lambda: on.apply(_aten.mul.Tensor, square, deviation),
        "power4": lambda: on.apply(_aten.mul.Tensor, square, square),
    }
    return made | {name: total(power()) for name, power in powers.items() if name in partials}


_aten, _convert = torch.ops.aten, torch.ops.prims.convert_element_type.default

NAME = "partials_3"
"""With a version: compiled graphs are cached, and do not know how an operator was lowered."""

_library = torch.library.Library("tmm", "FRAGMENT")
_library.define(
    f"{NAME}(Tensor x, int[] order, int length, str partials, bool is_wide) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _eagerly(
    x: torch.Tensor, order: Sequence[int], length: int, partials: str, is_wide: bool
) -> torch.Tensor:
    made: torch.Tensor = _partials(Plain, x, order, length, partials, is_wide)
    return made


def _shape(
    x: torch.Tensor, order: Sequence[int], length: int, partials: str, is_wide: bool
) -> torch.Tensor:
    shape = (partials.count(COLUMN_SEPARATOR) + 1, x.numel() // length)
    return x.new_empty(shape, dtype=torch.float64 if is_wide else torch.float32)


_library.impl(NAME, _eagerly, "CompositeExplicitAutograd")
torch.library.register_fake(f"tmm::{NAME}", _shape, lib=_library)

partials_of: Callable[[torch.Tensor, Sequence[int], int, str, bool], torch.Tensor] = getattr(
    torch.ops.tmm, NAME
).default
"""The partials of the rows of a tensor of shape ``(len(partials), rows)``.

Args:
    x: Float32 or half precision.
    order: As in ``Rows``.
    length: As in ``Rows``.
    partials: Names from ``PARTIALS``, separated by ``COLUMN_SEPARATOR``.
    is_wide: Whether they are float64, else float32.
"""


@functools.cache
def register_lowering() -> None:
    """Tell Inductor how partials are fused. Not on import: Inductor takes seconds."""
    fuse_operator(partials_of, _partials)
