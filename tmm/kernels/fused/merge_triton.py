"""Partials on a GPU: one launch merges those of all tensors of a graph.

Each program reads the partials of one tensor. Run in Triton's interpreter only so far, and compiled
for GPUs; never on a real one.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc,unused-ignore"

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence

import numpy as np
import torch

from tmm.core.metrics import TENSOR_COLUMNS
from tmm.kernels.dense import on_device, packed_dtype
from tmm.kernels.fused.merge_operator import ROUNDING, parts_of
from tmm.kernels.fused.row_partials import PARTIALS
from tmm.kernels.optional_triton import tl, triton

_BLOCK = 512  # rows per iteration: two for each thread, whose sums stay in registers
_HEAD = 4  # numbers of an entry before the places: first partial, rows, length, first result
_ENTRY = _HEAD + len(PARTIALS) + len(TENSOR_COLUMNS)
_CONSTANTS = {
    "ENTRY": _ENTRY,
    "HEAD": _HEAD,
    "PARTIALS": len(PARTIALS),
    "BLOCK": _BLOCK,
    "ROUNDING": ROUNDING,
    "num_warps": 8,
}
"""What the kernel is compiled for."""


def merge_joined_with_triton(
    joined: torch.Tensor, starts: torch.Tensor | None, rows: Sequence[int], layout: Sequence[int]
) -> torch.Tensor | None:
    """What ``tmm::merge_joined`` gives, on one GPU; None where its dtype is not expected."""
    device = joined.device
    if joined.dtype != torch.float32 or packed_dtype(device) != torch.float64:
        return None
    table, width = _table(tuple(map(int, rows)), tuple(layout), device)
    result = torch.empty(width, dtype=torch.float64, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        first, step = (table, _ENTRY) if starts is None else (starts, 1)
        _merge_parts[(len(rows),)](joined, table, first, step, result, **_CONSTANTS)
    return result


def prepare(rows: tuple[int, ...], layout: tuple[int, ...], device: torch.device) -> None:
    """Compile the kernel, and put the table onto a GPU, before a graph runs that merges so.

    While a CUDA graph is warmed up, what is allocated counts as its memory.
    """
    with torch.cuda.device(device):
        _table(rows, layout, device)
        given = torch.float32, torch.int64, torch.int64, _ENTRY, torch.float64
        _merge_parts.warmup(*given, **_CONSTANTS, grid=(1,))


@functools.lru_cache(maxsize=1024)
def _table(
    rows: tuple[int, ...], layout: tuple[int, ...], device: torch.device
) -> tuple[torch.Tensor, int]:
    """Where everything lies, on the device, and how many numbers come out.

    Kept, as it is the same in each step: nothing is copied while a CUDA graph is recorded.
    """
    table = np.full((len(rows), _ENTRY), -1, dtype=np.int64)
    first = start = 0
    for entry, number, part in zip(table, rows, parts_of(layout), strict=True):
        entry[:_HEAD] = first, number, part.length, start
        for place, name in enumerate(part.partials):
            entry[_HEAD + PARTIALS.index(name)] = place
        for place, name in enumerate(part.columns):
            entry[_HEAD + len(PARTIALS) + TENSOR_COLUMNS.index(name)] = place
        first += number * len(part.partials)
        start += len(part.columns)
    return on_device(torch.from_numpy(table), device), start


@triton.jit
def _partial(data, places, number, rows, start, lanes, otherwise):
    """Some rows of a partial, in float64; ``otherwise`` beyond the end, and where there is none."""
    place = tl.load(places + number)
    mask = (place >= 0) & (start + lanes < rows)
    values = tl.load(data + place * rows + start + lanes, mask=mask, other=otherwise)
    return values.to(tl.float64)


@triton.jit
def _moments(data, places, rows, length, start, lanes, ROUNDING: tl.constexpr):  # noqa: N803
    """The mean of each row, and mean powers of the deviation from it."""
    unit = _partial(data, places, 1, rows, start, lanes, 1.0)
    one = _partial(data, places, 2, rows, start, lanes, 0.0) * unit / length
    two = _partial(data, places, 3, rows, start, lanes, 0.0) * unit * unit / length
    two += _partial(data, places, 15, rows, start, lanes, 0.0) / length
    three = _partial(data, places, 4, rows, start, lanes, 0.0) * unit * unit * unit / length
    four = _partial(data, places, 5, rows, start, lanes, 0.0) * unit * unit * unit * unit / length
    mean = _partial(data, places, 0, rows, start, lanes, 0.0) + one
    second = two - one * one
    # A constant row: what is left is the rounding of its centre. (NaN stays.)
    constant = (second < 0.0) | ((second <= 1e-5 * two) & (two < float("inf")))
    is_half = tl.load(places + 15) >= 0
    constant = constant | (is_half & (second <= ROUNDING * mean * mean))
    second = tl.where(constant, 0.0, second)
    third = three - 3.0 * one * two + 2.0 * one * one * one
    fourth = four - 4.0 * one * three + 6.0 * one * one * two - 3.0 * one * one * one * one
    return mean, second, tl.where(constant, 0.0, third), tl.where(constant, 0.0, fourth)


@triton.jit(do_not_specialize=["step"])
def _merge_parts(
    joined,
    table,
    starts,
    step,
    result,
    ENTRY: tl.constexpr,  # noqa: N803 -- Triton's way of writing constants
    HEAD: tl.constexpr,  # noqa: N803
    PARTIALS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    ROUNDING: tl.constexpr,  # noqa: N803
):
    """Write the row of one tensor; columns in the order of ``TENSOR_COLUMNS``."""
    entry = table + tl.program_id(0).to(tl.int64) * ENTRY
    data = joined + tl.load(starts + tl.program_id(0).to(tl.int64) * step)
    rows = tl.load(entry + 1)
    length = tl.load(entry + 2).to(tl.float64)
    row = result + tl.load(entry + 3)
    lanes = tl.arange(0, BLOCK)
    places = entry + HEAD
    outputs = places + PARTIALS
    infinity = float("inf")
    means = tl.zeros([BLOCK], tl.float64)
    centres = tl.zeros([BLOCK], tl.float64)
    around_zero = tl.zeros([BLOCK], tl.float64)
    unbounded = tl.zeros([BLOCK], tl.int32)
    sums = tl.zeros([BLOCK], tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    absolutes = tl.zeros([BLOCK], tl.float64)
    zeros = tl.zeros([BLOCK], tl.float64)
    nans = tl.zeros([BLOCK], tl.float64)
    infinities = tl.zeros([BLOCK], tl.float64)
    undefined = tl.zeros([BLOCK], tl.int32)
    largest = tl.zeros([BLOCK], tl.float64)
    least = tl.full([BLOCK], infinity, tl.float64)
    greatest = tl.full([BLOCK], -infinity, tl.float64)
    for start in range(0, rows, BLOCK):
        inside = start + lanes < rows
        mean, second, _, _ = _moments(data, places, rows, length, start, lanes, ROUNDING)
        means += tl.where(inside, mean, 0.0)
        centres += _partial(data, places, 0, rows, start, lanes, 0.0)
        around_zero += tl.where(inside, second + mean * mean, 0.0)
        is_finite = (tl.abs(mean) < infinity) & (tl.abs(second) < infinity)
        unbounded += tl.where(inside & (is_finite == 0), 1, 0)
        sums += _partial(data, places, 6, rows, start, lanes, 0.0)
        squares += _partial(data, places, 7, rows, start, lanes, 0.0)
        absolutes += _partial(data, places, 8, rows, start, lanes, 0.0)
        zeros += _partial(data, places, 12, rows, start, lanes, 0.0)
        nans += _partial(data, places, 13, rows, start, lanes, 0.0)
        infinities += _partial(data, places, 14, rows, start, lanes, 0.0)
        high = _partial(data, places, 9, rows, start, lanes, 0.0)
        low = _partial(data, places, 10, rows, start, lanes, infinity)
        top = _partial(data, places, 11, rows, start, lanes, -infinity)
        # Whether a maximum carries NaN depends on the device, so that it is put in below.
        undefined += tl.where((high != high) | (low != low) | (top != top), 1, 0)
        largest = tl.maximum(largest, high)
        least = tl.minimum(least, low)
        greatest = tl.maximum(greatest, top)
    number = rows.to(tl.float64)
    total = tl.sum(means, 0)
    mean_of_all = total / number
    seconds = tl.zeros([BLOCK], tl.float64)
    thirds = tl.zeros([BLOCK], tl.float64)
    fourths = tl.zeros([BLOCK], tl.float64)
    if tl.load(outputs + 5) >= 0:
        for start in range(0, rows, BLOCK):
            inside = start + lanes < rows
            mean, second, third, fourth = _moments(
                data, places, rows, length, start, lanes, ROUNDING
            )
            delta = mean - mean_of_all
            square = delta * delta
            seconds += tl.where(inside, second + square, 0.0)
            thirds += tl.where(inside, third + 3.0 * delta * second + delta * square, 0.0)
            fourths += tl.where(
                inside,
                fourth + 4.0 * delta * third + 6.0 * square * second + square * square,
                0.0,
            )
    nan = float("nan")
    bad = tl.sum(undefined, 0) > 0
    absmax = tl.where(bad, nan, tl.max(largest, 0))
    is_bounded = tl.abs(total) < infinity
    has_moments = tl.load(places) >= 0
    from_moments = length * tl.where(is_bounded, total, tl.sum(centres, 0))
    plain = tl.where(has_moments, from_moments, tl.sum(sums, 0))
    derived = length * tl.sum(around_zero, 0)
    missing = tl.where(absmax != absmax, nan, infinity)
    derived = tl.where(tl.sum(unbounded, 0) > 0, missing, derived)
    has_squares = tl.load(places + 7) >= 0
    _store(row, outputs, 0, length * number)
    _store(row, outputs, 1, plain)
    _store(row, outputs, 2, tl.where(has_squares, tl.sum(squares, 0), derived))
    _store(row, outputs, 3, tl.sum(absolutes, 0))
    _store(row, outputs, 4, tl.where(tl.abs(mean_of_all) < infinity, mean_of_all, nan))
    _store(row, outputs, 5, length * tl.sum(seconds, 0))
    _store(row, outputs, 6, length * tl.sum(thirds, 0))
    _store(row, outputs, 7, length * tl.sum(fourths, 0))
    _store(row, outputs, 8, absmax)
    _store(row, outputs, 9, tl.where(bad, nan, tl.min(least, 0)))
    _store(row, outputs, 10, tl.where(bad, nan, tl.max(greatest, 0)))
    _store(row, outputs, 11, tl.sum(zeros, 0))
    _store(row, outputs, 12, tl.sum(nans, 0))
    _store(row, outputs, 13, tl.sum(infinities, 0))


@triton.jit
def _store(row, outputs, column, value):
    """Write a column where it is asked for."""
    place = tl.load(outputs + column)
    tl.store(row + place, value, mask=place >= 0)
