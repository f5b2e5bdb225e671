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
from typing import Any

import torch

from tmm.core.fusion_private import Lowered, fuse_operator
from tmm.core.metrics import TENSOR_COLUMNS
from tmm.kernels import kernel_registry
from tmm.kernels.dense import packed_dtype
from tmm.kernels.fused.row_partials import PARTIALS, register_lowering

ROUNDING = 2.0**-35
"""Of a row in half precision, the mean square of deviations below which these are its centre's
rounding, as a share of the centre's square. That is at most 2**-38; one element of ``SHORT_ROW``
which is not like the others gives at least 2**-32."""

VERSION = "2"
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
    joined: torch.Tensor, starts: torch.Tensor | None, rows: Sequence[int], layout: Sequence[int]
) -> torch.Tensor:
    """What ``merge_joined`` gives, by plain operations."""
    shapes = [
        (len(part.partials), number) for part, number in zip(parts_of(layout), rows, strict=True)
    ]
    sizes = [partials * number for partials, number in shapes]
    places = [sum(sizes[:index]) for index in range(len(sizes))] if starts is None else starts
    parts = [
        joined.narrow(0, int(place), size).view(shape)
        for place, size, shape in zip(places, sizes, shapes, strict=True)
    ]
    return merge_with_torch(parts, layout)


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
    if "spread" in given:
        twos = given["spread"] / length
    means = centre + ones
    second = (twos - ones**2).clamp(min=0)
    if "power1" in given:
        # A constant row: what is left is the rounding of its centre.
        second = torch.where((second <= 1e-5 * twos) & twos.isfinite(), nothing, second)
    if "spread" in given:
        second = torch.where(second <= ROUNDING * means**2, nothing, second)
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


_library.define(
    "merge_joined(Tensor joined, Tensor? starts, SymInt[] rows, int[] layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides),
)


def _merge_joined(
    joined: torch.Tensor, starts: torch.Tensor | None, rows: list[int], layout: list[int]
) -> torch.Tensor:
    return kernel_registry.run("merge_joined", joined.device, joined, starts, rows, layout)


def _merge_joined_shape(
    joined: torch.Tensor, starts: torch.Tensor | None, rows: list[int], layout: list[int]
) -> torch.Tensor:
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
merge_joined: Callable[..., torch.Tensor] = torch.ops.tmm.merge_joined.default
"""The same of partials in one tensor.

Args:
    joined: The partials of all tensors, flat.
    starts: Where those of each tensor begin, int64; None if one after the other.
    rows: How many rows each of them has.
    layout: As for ``merge``.
"""

MERGE_APART = "merge_apart_1"
"""With a version: compiled graphs are cached, and do not know how an operator was lowered."""

_library.define(
    f"{MERGE_APART}(Tensor[] parts, int[] layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _merge_apart(parts: list[torch.Tensor], layout: list[int]) -> torch.Tensor:
    joined = torch.cat([part.flatten() for part in parts])
    return merge_joined(joined, None, [part.shape[1] for part in parts], layout)


_library.impl(MERGE_APART, _merge_apart, "CompositeExplicitAutograd")
torch.library.register_fake(f"tmm::{MERGE_APART}", _merge_shape, lib=_library)

merge_apart: Callable[[list[torch.Tensor], list[int]], torch.Tensor] = getattr(
    torch.ops.tmm, MERGE_APART
).default
"""What ``merge`` gives, by ``merge_joined``."""


def _merge_in_place(on: type[Lowered], parts: list[Any], layout: list[int]) -> Any:
    """``merge_apart`` where kernels write partials into their places in one tensor.

    Two modules may give the same tensor, and a sum hands its gradient to each operand: their
    partials lie there once.
    """
    kept, places = on.distinct(parts)
    shapes = [on.sizes(part) for part in kept]
    starts = [0]
    for partials, rows in shapes:
        starts.append(starts[-1] + partials * rows)
    joined = on.join(kept)
    given = None
    if len(kept) < len(parts):
        given = on.integers([starts[place] for place in places], joined.get_device())
    return on.call(merge_joined, joined, given, [shapes[place][1] for place in places], layout)


@functools.cache
def register_lowerings() -> None:
    """Tell Inductor how partials are fused and joined. Not on import: Inductor takes seconds."""
    register_lowering()
    fuse_operator(merge_apart, _merge_in_place)


def merge_parts(partials: Sequence[torch.Tensor], layout: Sequence[int]) -> torch.Tensor:
    """The rows of the partials of several tensors, as it is best for their device."""
    if partials[0].device.type == "cpu":
        return merge(list(partials), list(layout))
    return merge_apart(list(partials), list(layout))
