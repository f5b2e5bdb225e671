"""``tmm.kernels.summarize.group`` on a GPU: one launch for all tensors, or pairs, of a dtype.

Each program reads one chunk of one tensor, found through a table of addresses, and writes the row
of its partial sums; a second launch joins the rows of each tensor. Of a pair the first one reads
both, found through two tables, and no difference is written down. The tables travel in one copy
from pinned memory, so that gradients may move from step to step. Tensors that lie one after the
other, as heads do, and a single pair need none: nothing is copied inside of a graph.

Run in Triton's interpreter only so far, and compiled for GPUs; never on a real one.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc,unused-ignore"

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tmm.core.metrics import COLUMN_ORDER, PAIR_COLUMNS, TENSOR_COLUMNS
from tmm.kernels.dense import flatten, on_device, real
from tmm.kernels.optional_triton import tl, triton
from tmm.kernels.summarize.chunk_triton import merge_chunks, reduce_chunk
from tmm.kernels.summarize.differences import Pairs, can_be_read_together, flatten_pair, lie_alike

_CHUNK = 1 << 15  # elements per program: the rows are then less than 1 % of the tensors
_BLOCK = 1 << 11  # elements per iteration, and those whose mean is the centre of the deviations
_ALIGNMENT = 16  # bytes that one thread loads at once
_JOINED = 1 << 7  # rows of chunks that are joined per iteration

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def summarize_group_with_triton(
    tensors: Sequence[torch.Tensor], columns: tuple[str, ...]
) -> torch.Tensor:
    """The rows of ``summarize_group``, of tensors on one GPU.

    Nothing here waits for the device. Tensors that do not lie densely and complex ones are copied,
    all of them at the same time.
    """
    flat = [flatten(real(tensor.detach())) for tensor in tensors]
    flat = [x if x.dtype in _DTYPES else x.float() for x in flat]
    return _summarized(flat, flat, columns, is_pair=False)


def summarize_pairs_with_triton(pairs: Pairs, columns: tuple[str, ...]) -> torch.Tensor | None:
    """The rows of ``summarize_pairs``, of pairs on one GPU.

    None for what it cannot read, and for many pairs that it had to copy.
    """
    if not all(can_be_read_together(*pair) for pair in pairs):
        return None
    if len(pairs) > 1 and not all(lie_alike(*pair) for pair in pairs):
        return None
    together = [flatten_pair(own.detach(), other.detach()) for own, other in pairs]
    own, others = ([flatten(pair[side]) for pair in together] for side in (0, 1))
    return _summarized(own, others, columns, is_pair=True)


def _summarized(
    flat: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    columns: tuple[str, ...],
    *,
    is_pair: bool,
) -> torch.Tensor:
    """The rows of dense tensors; ``others`` are what is subtracted of each, of pairs."""
    written = _written(is_pair=is_pair)
    constants = _constants(columns, is_pair=is_pair)
    reduce = _rows_of_stack if _are_stacked(flat) and _are_stacked(others) else _rows_by_table
    device = flat[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        rows = reduce(flat, others, constants, has_moments="mean" in columns)
    if columns == written:
        return rows
    return torch.stack([rows[:, written.index(name)] for name in columns], dim=1)


def _written(*, is_pair: bool) -> tuple[str, ...]:
    """The row that kernels write: reading the elements costs more than what is not asked for."""
    return COLUMN_ORDER if is_pair else TENSOR_COLUMNS


def _constants(columns: tuple[str, ...], *, is_pair: bool) -> dict[str, Any]:
    """What kernels are compiled for, besides dtypes and alignment."""
    return {
        "FOURTH": "moment4" in columns,
        "CHUNK": _CHUNK,
        "BLOCK": _BLOCK,
        "WIDTH": len(_written(is_pair=is_pair)),
        "IS_PAIR": is_pair,
        "BOTH": any(name in columns for name in PAIR_COLUMNS),
        "num_warps": 8,  # few enough elements per thread to stay in registers
    }


def _are_stacked(flat: Sequence[torch.Tensor]) -> bool:
    """Whether tensors of one dtype and size, which is not 0, lie one after the other."""
    first = flat[0]
    size, start = first.numel() * first.element_size(), first.data_ptr()
    return size > 0 and all(
        x.dtype == first.dtype and x.numel() == first.numel() and x.data_ptr() == start + i * size
        for i, x in enumerate(flat)
    )


def _rows_of_stack(
    flat: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    constants: dict[str, Any],
    *,
    has_moments: bool,
) -> torch.Tensor:
    """The rows of stacked tensors, with all columns."""
    own, other, elements = flat[0], others[0], flat[0].numel()
    chunks = -(-elements // _CHUNK)
    total = chunks * len(flat)
    rows = torch.empty(total, constants["WIDTH"], dtype=torch.float64, device=own.device)
    is_aligned = all(
        x.data_ptr() % _ALIGNMENT == 0
        and (len(flat) == 1 or elements * x.element_size() % _ALIGNMENT == 0)
        for x in (own, other)
    )
    _reduce_stacked[(total,)](
        *(own, other, elements, chunks, rows),
        WIDE=_wide(own.dtype, other.dtype),
        ALIGNMENT=_ALIGNMENT if is_aligned else 1,
        **constants,
    )
    if chunks == 1:
        return rows
    merged = rows.new_empty(len(flat), constants["WIDTH"])
    merge_chunks[(len(flat),)](
        *(rows, rows, chunks, rows, merged), **_of_merging(constants, has_moments, is_stacked=True)
    )
    return merged


def _rows_by_table(
    flat: Sequence[torch.Tensor],
    others: Sequence[torch.Tensor],
    constants: dict[str, Any],
    *,
    has_moments: bool,
) -> torch.Tensor:
    """The same of tensors that lie anywhere, of any dtypes and sizes."""
    groups: dict[tuple[torch.dtype, torch.dtype, bool], list[int]] = {}
    for index, (own, other) in enumerate(zip(flat, others, strict=True)):
        if own.numel():
            is_aligned = all(x.data_ptr() % _ALIGNMENT == 0 for x in (own, other))
            groups.setdefault((own.dtype, other.dtype, is_aligned), []).append(index)
    elements = np.array([x.numel() for x in flat], dtype=np.int64)
    chunks = -(-elements // _CHUNK)
    begins = np.zeros_like(chunks)  # the place of a tensor's first chunk among all
    owners, starts = [np.zeros(0, dtype=np.int64)], [0]
    for members in groups.values():
        begins[members] = starts[-1] + np.cumsum(chunks[members]) - chunks[members]
        owners.append(np.repeat(members, chunks[members]))
        starts.append(starts[-1] + len(owners[-1]))
    addresses = [
        np.array([x.data_ptr() for x in side], dtype=np.int64)
        for side in ((flat, others) if constants["IS_PAIR"] else (flat,))
    ]
    numbers = np.concatenate([elements, begins, *addresses, *owners])
    table = on_device(torch.from_numpy(numbers), flat[0].device)
    sizes = [len(flat)] * (2 + len(addresses))
    all_elements, all_begins, *all_addresses, owner = table.split([*sizes, starts[-1]])
    rows = torch.empty(starts[-1], constants["WIDTH"], dtype=torch.float64, device=table.device)
    for (dtype, other_dtype, is_aligned), start, end in zip(
        groups, starts, starts[1:], strict=False
    ):
        _reduce_chunks[(end - start,)](
            *(all_addresses[0], all_addresses[-1], all_elements, all_begins, owner, start, rows),
            DTYPE=_of_triton(dtype),
            OTHER=_of_triton(other_dtype),
            WIDE=_wide(dtype, other_dtype),
            ALIGNMENT=_ALIGNMENT if is_aligned else 1,
            **constants,
        )
    merged = rows.new_empty(len(flat), constants["WIDTH"])
    merge_chunks[(len(flat),)](
        *(all_begins, all_elements, 0, rows, merged),
        **_of_merging(constants, has_moments, is_stacked=False),
    )
    return merged


def _of_merging(
    constants: dict[str, Any], has_moments: bool, *, is_stacked: bool
) -> dict[str, Any]:
    """What the kernel that joins rows is compiled for."""
    taken = {name: constants[name] for name in ("CHUNK", "WIDTH", "FOURTH", "IS_PAIR")}
    return {**taken, "MOMENTS": has_moments, "IS_STACKED": is_stacked, "BLOCK": _JOINED}


def _wide(own: torch.dtype, other: torch.dtype) -> Any:
    """The dtype that elements are added up in."""
    return tl.float64 if torch.float64 in (own, other) else tl.float32


def _of_triton(dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


@triton.jit(do_not_specialize=["start"])
def _reduce_chunks(
    addresses,
    others,
    elements,
    begins,
    owners,
    start,
    rows,
    DTYPE: tl.constexpr,  # noqa: N803 -- Triton's way of writing constants
    OTHER: tl.constexpr,  # noqa: N803
    WIDE: tl.constexpr,  # noqa: N803
    FOURTH: tl.constexpr,  # noqa: N803
    ALIGNMENT: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    IS_PAIR: tl.constexpr,  # noqa: N803
    BOTH: tl.constexpr,  # noqa: N803
):
    """Write the row of one chunk of one of the tensors, or pairs, that lie anywhere."""
    chunk = tl.program_id(0).to(tl.int64) + start
    tensor = tl.load(owners + chunk)
    before = (chunk - tl.load(begins + tensor)) * CHUNK
    length = tl.minimum(tl.load(elements + tensor) - before, CHUNK).to(tl.int32)
    data = tl.load(addresses + tensor).to(tl.pointer_type(DTYPE))
    data = tl.multiple_of(data + before, ALIGNMENT)
    other = tl.load(others + tensor).to(tl.pointer_type(OTHER))
    other = tl.multiple_of(other + before, ALIGNMENT)
    row = rows + chunk * WIDTH
    reduce_chunk(data, other, length, row, WIDE, FOURTH, BLOCK, IS_PAIR, BOTH)


@triton.jit(do_not_specialize=["elements", "chunks"])
def _reduce_stacked(
    own,
    subtracted,
    elements,
    chunks,
    rows,
    WIDE: tl.constexpr,  # noqa: N803
    FOURTH: tl.constexpr,  # noqa: N803
    ALIGNMENT: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    IS_PAIR: tl.constexpr,  # noqa: N803
    BOTH: tl.constexpr,  # noqa: N803
):
    """The same of tensors of one size that lie one after the other."""
    chunk = tl.program_id(0).to(tl.int64)
    start = chunk % chunks * CHUNK
    length = tl.minimum(elements - start, CHUNK).to(tl.int32)
    start += chunk // chunks * elements
    data = tl.multiple_of(own + start, ALIGNMENT)
    other = tl.multiple_of(subtracted + start, ALIGNMENT)
    row = rows + chunk * WIDTH
    reduce_chunk(data, other, length, row, WIDE, FOURTH, BLOCK, IS_PAIR, BOTH)
