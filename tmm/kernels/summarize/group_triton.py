"""``tmm.kernels.summarize.group`` on a GPU: one launch for all tensors of a dtype.

Each program reads one chunk of one tensor, found through a table of addresses, and writes the row
of its partial sums; a constant number of torch operations joins the rows of a tensor. The tables
travel in one copy from pinned memory, so that gradients may move from step to step.

Run in Triton's interpreter only so far, and compiled for sm_90 and sm_80; never on a real GPU.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc,unused-ignore"

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np
import torch

from tmm.core.metrics import TENSOR_COLUMNS
from tmm.kernels.dense import flatten, on_device, real
from tmm.kernels.optional_triton import tl, triton
from tmm.kernels.summarize.group import merge_rows

_CHUNK = 1 << 15  # elements per program: the rows are then less than 1 % of the tensors
_BLOCK = 1 << 11  # elements per iteration, and those whose mean is the centre of the deviations
_ALIGNMENT = 16  # bytes that one thread loads at once

_WRITTEN = TENSOR_COLUMNS
"""The row that the kernel writes: reading the elements costs more than what is not asked for."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def summarize_group_with_triton(
    tensors: Sequence[torch.Tensor], columns: tuple[str, ...]
) -> torch.Tensor:
    """The rows of ``summarize_group``, of tensors on one GPU."""
    needed = columns if "count" in columns else ("count", *columns)  # merging weighs by it
    return summarize_chunks(tensors, needed)[:, len(needed) - len(columns) :]


def summarize_chunks(tensors: Sequence[torch.Tensor], columns: tuple[str, ...]) -> torch.Tensor:
    """The rows of ``summarize_group``, of tensors on one GPU; ``columns`` holds ``count``.

    Nothing here waits for the device. Tensors that do not lie densely and complex ones are
    copied, all of them at the same time.
    """
    device = tensors[0].device
    flat = [flatten(real(tensor.detach())) for tensor in tensors]
    flat = [x if x.dtype in _DTYPES else x.float() for x in flat]
    groups: dict[tuple[torch.dtype, bool], list[int]] = {}
    for index, x in enumerate(flat):
        if x.numel():
            aligned = x.data_ptr() % _ALIGNMENT == 0
            groups.setdefault((x.dtype, aligned), []).append(index)
    elements = np.array([x.numel() for x in flat], dtype=np.int64)
    chunks = -(-elements // _CHUNK)
    first = np.zeros_like(chunks)  # a tensor's first chunk, counted from its group's first
    owners = [np.zeros(0, dtype=np.int64)]
    for members in groups.values():
        first[members] = np.cumsum(chunks[members]) - chunks[members]
        owners.append(np.repeat(members, chunks[members]))
    addresses = np.array([x.data_ptr() for x in flat], dtype=np.int64)
    numbers = torch.from_numpy(np.concatenate([addresses, elements, first, *owners]))
    table = on_device(numbers, device)
    total = len(table) - 3 * len(flat)
    all_addresses, all_elements, all_first, owner = table.split([len(flat)] * 3 + [total])
    rows = torch.empty(total, len(_WRITTEN), dtype=torch.float64, device=device)
    start = 0
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for ((dtype, aligned), _), own in zip(groups.items(), owners[1:], strict=True):
            _reduce_chunks[(len(own),)](
                all_addresses,
                all_elements,
                all_first,
                owner[start:],
                rows[start:],
                DTYPE=getattr(tl, str(dtype).removeprefix("torch.")),
                WIDE=tl.float64 if dtype == torch.float64 else tl.float32,
                FOURTH="moment4" in columns,
                ALIGNMENT=_ALIGNMENT if aligned else 1,
                CHUNK=_CHUNK,
                BLOCK=_BLOCK,
                WIDTH=len(_WRITTEN),
                num_warps=8,  # few enough elements per thread to stay in registers
            )
            start += len(own)
    if columns != _WRITTEN:
        rows = torch.stack([rows[:, _WRITTEN.index(name)] for name in columns], dim=1)
    return merge_rows(rows, owner, len(flat), columns)


@triton.jit
def _load(data, remaining, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """One block; zeros beyond the end. Only loads without a mask are vectorized."""
    lanes = tl.arange(0, BLOCK)
    if remaining >= BLOCK:
        x = tl.load(data + lanes)
    else:
        x = tl.load(data + lanes, mask=lanes < remaining, other=0.0)
    return x.to(WIDE)


@triton.jit
def _finite(x):
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _reduce_chunks(
    addresses,
    elements,
    first,
    owners,
    rows,
    DTYPE: tl.constexpr,  # noqa: N803 -- Triton's way of writing constants
    WIDE: tl.constexpr,  # noqa: N803
    FOURTH: tl.constexpr,  # noqa: N803
    ALIGNMENT: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    """Write the row of one chunk, with all columns of ``_WRITTEN``.

    Deviations are taken from the mean of the chunk's first block, and the power sums moved to
    the chunk's mean in float64.
    """
    chunk = tl.program_id(0).to(tl.int64)
    tensor = tl.load(owners + chunk)
    start = (chunk - tl.load(first + tensor)) * CHUNK
    length = tl.minimum(tl.load(elements + tensor) - start, CHUNK).to(tl.int32)
    data = tl.load(addresses + tensor).to(tl.pointer_type(DTYPE))
    data = tl.multiple_of(data + start, ALIGNMENT)
    lanes = tl.arange(0, BLOCK)

    infinity = float("inf")
    if FOURTH:  # fourth powers leave the range of float32 soon, and the centre must be nearer
        total = tl.zeros([BLOCK], WIDE)
        lowest = tl.full([BLOCK], infinity, WIDE)
        highest = tl.full([BLOCK], -infinity, WIDE)
        for offset in range(0, length, BLOCK):
            x = _load(data + offset, length - offset, WIDE, BLOCK)
            inside = offset + lanes < length
            total += x
            lowest = tl.minimum(lowest, tl.where(inside, x, infinity))
            highest = tl.maximum(highest, tl.where(inside, x, -infinity))
        centre = _finite(tl.sum(total, 0) / length.to(WIDE))
        unit = tl.maximum(tl.max(highest, 0) - centre, centre - tl.min(lowest, 0))
        unit = tl.where(unit > 0.0, unit, 1.0)
    else:
        sample = _load(data, length, WIDE, BLOCK)
        centre = _finite(tl.sum(sample, 0) / tl.minimum(length, BLOCK).to(WIDE))
        unit = centre * 0.0 + 1.0

    plain = tl.zeros([BLOCK], WIDE)
    squares = tl.zeros([BLOCK], WIDE)
    absolute = tl.zeros([BLOCK], WIDE)
    power1 = tl.zeros([BLOCK], WIDE)
    power2 = tl.zeros([BLOCK], WIDE)
    power3 = tl.zeros([BLOCK], WIDE)
    power4 = tl.zeros([BLOCK], WIDE)
    lowest = tl.full([BLOCK], infinity, WIDE)
    highest = tl.full([BLOCK], -infinity, WIDE)
    zeros = tl.zeros([BLOCK], tl.int32)
    nans = tl.zeros([BLOCK], tl.int32)
    infinities = tl.zeros([BLOCK], tl.int32)
    for offset in range(0, length, BLOCK):
        x = _load(data + offset, length - offset, WIDE, BLOCK)
        inside = offset + lanes < length
        magnitude = tl.abs(x)
        deviation = tl.where(inside, x - centre, 0.0)
        plain += x
        squares += x * x
        absolute += magnitude
        if FOURTH:
            deviation = deviation / unit
            power3 += deviation * deviation * deviation
            power4 += (deviation * deviation) * (deviation * deviation)
        power1 += deviation
        power2 += deviation * deviation
        lowest = tl.minimum(lowest, tl.where(inside, x, infinity))
        highest = tl.maximum(highest, tl.where(inside, x, -infinity))
        zeros += (inside & (x == 0.0)).to(tl.int32)
        nans += (x != x).to(tl.int32)
        infinities += (magnitude == infinity).to(tl.int32)

    count = length.to(tl.float64)
    mean1 = tl.sum(power1, 0).to(tl.float64) / count
    mean2 = tl.sum(power2, 0).to(tl.float64) / count
    scale = unit.to(tl.float64)
    second = mean2 - mean1 * mean1
    # A constant chunk: what is left is the rounding of its centre.
    constant = (second <= 1e-5 * mean2) & (mean2 < infinity)
    second = tl.where(constant, 0.0, second)
    finite = tl.abs(mean1) < infinity
    mean = centre.to(tl.float64) + tl.where(finite, mean1, float("nan")) * scale
    moment3 = count * 0.0
    moment4 = count * 0.0
    if FOURTH:
        mean3 = tl.sum(power3, 0).to(tl.float64) / count
        mean4 = tl.sum(power4, 0).to(tl.float64) / count
        square = mean1 * mean1
        third = mean3 - 3.0 * mean1 * mean2 + 2.0 * square * mean1
        fourth = mean4 - 4.0 * mean1 * mean3 + 6.0 * square * mean2 - 3.0 * square * square
        cube = scale * scale * scale
        moment3 = tl.where(constant, 0.0, count * third * cube)
        moment4 = tl.where(constant, 0.0, count * fourth * cube * scale)

    # Whether a minimum carries NaN depends on the device, so that it is put in here.
    nan_count = tl.sum(nans, 0)
    minimum = tl.where(nan_count > 0, float("nan"), tl.min(lowest, 0).to(tl.float64))
    maximum = tl.where(nan_count > 0, float("nan"), tl.max(highest, 0).to(tl.float64))
    absmax = tl.maximum(tl.abs(minimum), tl.abs(maximum))
    absmax = tl.where(nan_count > 0, float("nan"), absmax)
    row = rows + chunk * WIDTH
    tl.store(row, count)
    tl.store(row + 1, tl.sum(plain, 0).to(tl.float64))
    tl.store(row + 2, tl.sum(squares, 0).to(tl.float64))
    tl.store(row + 3, tl.sum(absolute, 0).to(tl.float64))
    tl.store(row + 4, mean)
    tl.store(row + 5, count * second * scale * scale)
    tl.store(row + 6, moment3)
    tl.store(row + 7, moment4)
    tl.store(row + 8, absmax)
    tl.store(row + 9, minimum)
    tl.store(row + 10, maximum)
    tl.store(row + 11, tl.sum(zeros, 0).to(tl.float64))
    tl.store(row + 12, nan_count.to(tl.float64))
    tl.store(row + 13, tl.sum(infinities, 0).to(tl.float64))
