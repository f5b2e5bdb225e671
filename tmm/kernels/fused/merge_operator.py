"""The operators ``tmm::merge`` and ``tmm::merge_joined``: partials become rows of float64 numbers.

One call serves all that a graph measures on a device: in C++ on a CPU, one launch of Triton on a
GPU, plain torch operations elsewhere. On a GPU the partials of all tensors lie one after the other
in one tensor, into which Inductor lets kernels write: no addresses need to be copied there, which
a CUDA graph would do with those of its recording.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from tmm.core.metrics import TENSOR_COLUMNS
from tmm.core.inductor_private import join_in_place
from tmm.kernels import kernel_registry
from tmm.kernels.dense import packed_dtype
from tmm.kernels.fused.row_partials import PARTIALS

VERSION = "1"
"""To be changed with what ``merge_parts`` computes: compiled graphs that call it are cached."""


@dataclass(frozen=True)
class Part:
    """One part of a layout: what is given of a tensor, and what is asked for."""

    length: int
    partials: tuple[str, ...]
    columns: tuple[str, ...]


def parts_of(layout: Sequence[int]) -> Iterator[Part]:
    """The parts of a layout, each as ``FusedRow.layout`` gives it."""
    numbers = iter(layout)

    def names(known: Sequence[str]) -> tuple[str, ...]:
        return tuple(known[next(numbers)] for _ in range(next(numbers)))

    for length in numbers:
        yield Part(length, names(PARTIALS), names(TENSOR_COLUMNS))


def merge_with_torch(parts: Sequence[torch.Tensor], layout: Sequence[int]) -> torch.Tensor:
    """What ``merge`` gives, by plain operations: what its kernels must equal."""
    wide = packed_dtype(parts[0].device)
    pairs = zip(parts, parts_of(layout), strict=True)
    return torch.cat([_row(tensor.to(wide), part) for tensor, part in pairs])


def merge_joined_with_torch(
    joined: torch.Tensor, rows: Sequence[int], layout: Sequence[int]
) -> torch.Tensor:
    """What ``merge_joined`` gives, by plain operations."""
    shapes = [
        (len(part.partials), number) for part, number in zip(parts_of(layout), rows, strict=True)
    ]
    parts = joined.split([partials * number for partials, number in shapes])
    return merge_with_torch(
        [part.view(shape) for part, shape in zip(parts, shapes, strict=True)], layout
    )


def _row(partials: torch.Tensor, part: Part) -> torch.Tensor:
    given = dict(zip(part.partials, partials, strict=True))
    rows = partials.shape[1]
    count = partials.new_full((), rows * part.length)
    made = {"count": count}
    for name in ("sum", "sum_squares", "sum_absolute", "zeros", "nans", "infinities"):
        if name in given:
            made[name] = given[name].sum()
    for name in ("absmax", "maximum"):
        if name in given:
            made[name] = given[name].amax()
    if "minimum" in given:
        made["minimum"] = given["minimum"].amin()
    if "centre" in given:
        made |= _moments(given, part, made)
    return torch.stack([made[name] for name in part.columns])


def _moments(
    given: dict[str, torch.Tensor], part: Part, made: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Mean and sums of powers of the deviation from it, by Pébay 2008, eq. 2.1, of equal counts."""
    length, centre = part.length, given["centre"]
    nothing = torch.zeros_like(centre)
    unit = given.get("unit", nothing + 1)
    ones, twos, threes, fours = (
        given.get(f"power{power}", nothing) * unit**power / length for power in range(1, 5)
    )
    means = centre + ones
    second = (twos - ones**2).clamp(min=0)
    if "power1" in given:
        # A constant row: what is left is the rounding of its centre.
        second = torch.where((second <= 1e-5 * twos) & twos.isfinite(), nothing, second)
    mean = means.mean()
    delta = means - mean
    is_finite = second.isfinite().all() & mean.isfinite()
    nan = torch.full_like(mean, float("nan"))
    total = torch.where(means.isfinite().all(), means.sum(), centre.sum()) * length
    squares = (second + means**2).sum() * length
    if "absmax" in made:
        largest = made["absmax"]
        unbounded = torch.where(largest.isnan(), nan, torch.full_like(mean, float("inf")))
        squares = torch.where(is_finite, squares, unbounded)
    found = {
        "sum": total,
        "sum_squares": made.get("sum_squares", squares),
        "mean": torch.where(mean.isfinite(), mean, nan),
        "moment2": length * (second + delta**2).sum(),
    }
    if "power4" in given:
        third = threes - 3 * ones * twos + 2 * ones**3
        fourth = fours - 4 * ones * threes + 6 * ones**2 * twos - 3 * ones**4
        third, fourth = (torch.where(second == 0, nothing, x) for x in (third, fourth))
        found["moment3"] = length * (third + 3 * delta * second + delta**3).sum()
        found["moment4"] = (
            length * (fourth + 4 * delta * third + 6 * delta**2 * second + delta**4).sum()
        )
    return found


_library = torch.library.Library("tmm", "FRAGMENT")
_library.define(
    "merge(Tensor[] parts, int[] layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _merge(parts: list[torch.Tensor], layout: list[int]) -> torch.Tensor:
    return kernel_registry.run("merge", parts[0].device, parts, layout)


def _merge_shape(parts: list[torch.Tensor], layout: list[int]) -> torch.Tensor:
    return _empty_rows(parts[0], layout)


def _empty_rows(like: torch.Tensor, layout: list[int]) -> torch.Tensor:
    width = sum(len(part.columns) for part in parts_of(layout))
    return like.new_empty(width, dtype=packed_dtype(like.device))


JOIN = "join_1"
"""With a version: compiled graphs are cached, and do not know how an operator was lowered."""

_library.define(f"{JOIN}(Tensor[] parts) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.reshape(-1) for part in parts])


_library.impl(JOIN, _join, "CompositeExplicitAutograd")
torch.library.register_fake(f"tmm::{JOIN}", _join, lib=_library)

_library.define(
    "merge_joined(Tensor joined, SymInt[] rows, int[] layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _merge_joined(joined: torch.Tensor, rows: list[int], layout: list[int]) -> torch.Tensor:
    return kernel_registry.run("merge_joined", joined.device, joined, rows, layout)


def _merge_joined_shape(joined: torch.Tensor, rows: list[int], layout: list[int]) -> torch.Tensor:
    return _empty_rows(joined, layout)


_library.impl("merge_joined", _merge_joined, "CompositeExplicitAutograd")
torch.library.register_fake("tmm::merge_joined", _merge_joined_shape, lib=_library)
_library.impl("merge", _merge, "CompositeExplicitAutograd")  # of a CPU in C++, once it is loaded
torch.library.register_fake("tmm::merge", _merge_shape, lib=_library)

merge: Callable[[list[torch.Tensor], list[int]], torch.Tensor] = torch.ops.tmm.merge.default
"""The rows of many tensors, one after the other.

Args:
    parts: Partials of shape ``(partials, rows)``.
    layout: One after the other the layouts of the parts.

Returns:
    ``packed_dtype``, shape ``(sum of the widths,)``.
"""
join: Callable[[list[torch.Tensor]], torch.Tensor] = getattr(torch.ops.tmm, JOIN).default
"""The tensors of a list, one after the other and flat."""

merge_joined: Callable[..., torch.Tensor] = torch.ops.tmm.merge_joined.default
"""The same of partials in one tensor.

Args:
    joined: The partials of all tensors, flat, one after the other.
    rows: How many rows each of them has.
    layout: As for ``merge``.
"""


def merge_parts(partials: Sequence[torch.Tensor], layout: Sequence[int]) -> torch.Tensor:
    """The rows of the partials of several tensors, as it is best for their device."""
    if partials[0].device.type == "cpu":
        return merge(list(partials), list(layout))
    return merge_joined(join(list(partials)), [part.shape[1] for part in partials], list(layout))


@functools.cache
def register_join() -> None:
    """Tell Inductor how partials are joined. Not on import: Inductor takes seconds."""
    join_in_place(join)
