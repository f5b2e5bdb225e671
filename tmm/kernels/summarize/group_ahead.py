"""The kernels of a GPU that reduce several tensors, compiled before a graph that needs them."""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc,unused-ignore"

from __future__ import annotations

from collections.abc import Iterable

import torch

from tmm.kernels.summarize.chunk_triton import merge_chunks
from tmm.kernels.summarize.group_triton import (
    _ALIGNMENT,
    _CHUNK,
    _DTYPES,
    _constants,
    _of_merging,
    _of_triton,
    _reduce_chunks,
    _reduce_stacked,
    _wide,
)


def compile_group_ahead(
    dtypes: Iterable[torch.dtype], columns: tuple[str, ...], device: torch.device
) -> None:
    """Compile what ``summarize_group_with_triton`` needs for several tensors of these dtypes.

    Unless they come to lie at addresses that are not aligned.
    """
    constants, table = _constants(columns, is_pair=False), torch.int64
    with torch.cuda.device(device):
        for dtype in {dtype if dtype in _DTYPES else torch.float32 for dtype in dtypes}:
            _reduce_chunks.warmup(
                *(table, table, table, table, table, 0, torch.float64),
                DTYPE=_of_triton(dtype),
                OTHER=_of_triton(dtype),
                WIDE=_wide(dtype, dtype),
                ALIGNMENT=_ALIGNMENT,
                grid=(1,),
                **constants,
            )
        merge_chunks.warmup(
            *(table, table, 0, torch.float64, torch.float64),
            grid=(1,),
            **_of_merging(constants, "mean" in columns, is_stacked=False),
        )


def compile_pairs_ahead(
    own: torch.dtype,
    other: torch.dtype,
    columns: tuple[str, ...],
    elements: int,
    device: torch.device,
) -> None:
    """Compile what ``summarize_pairs_with_triton`` needs for one such pair, if it can read it.

    Unless its tensors come to lie at addresses that are not aligned.
    """
    if own not in _DTYPES or other not in _DTYPES or not elements:
        return
    chunks, constants = -(-elements // _CHUNK), _constants(columns, is_pair=True)
    with torch.cuda.device(device):
        _reduce_stacked.warmup(
            *(own, other, elements, chunks, torch.float64),
            WIDE=_wide(own, other),
            ALIGNMENT=_ALIGNMENT,
            grid=(1,),
            **constants,
        )
        merge_chunks.warmup(
            *(torch.float64, torch.float64, chunks, torch.float64, torch.float64),
            grid=(1,),
            **_of_merging(constants, "mean" in columns, is_stacked=True),
        )
