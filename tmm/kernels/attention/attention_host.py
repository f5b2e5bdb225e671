"""Statistics of attention on a CPU, by ``attention_host.cpp``, compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch

from tmm.kernels.attention.attention_call import ATTENTION_COLUMNS, AttentionCall
from tmm.kernels.build import DTYPES, VECTORS, kernels_of, load_library

SOURCES = (VECTORS, "attention/attention_host.cpp")
_MASK_TYPES = (None, torch.bool, *DTYPES)  # in the order of `mask_reader` in the source

_Integer, _Pointer = ctypes.c_int64, ctypes.c_void_p
_Strides = _Integer * 4


class _Geometry(ctypes.Structure):
    """``Geometry`` of the source."""

    _fields_ = (
        *((name, _Strides) for name in ("query_strides", "key_strides", "mask_strides")),
        *((name, _Integer) for name in ("batch", "heads", "key_heads", "queries", "keys")),
        *((name, _Integer) for name in ("channels", "mask_type", "query_step", "is_causal")),
        ("threads", _Integer),
        ("scale", ctypes.c_double),
    )


ARGUMENTS = (ctypes.POINTER(_Geometry), *[_Pointer] * 4)
"""The types of what a kernel is called with."""


def summarize_attention_on_host(call: AttentionCall) -> torch.Tensor | None:
    """The rows of ``summarize_attention``; what it allocates is linear in the sequence length.

    Returns:
        Float64, shape ``(heads, len(ATTENTION_COLUMNS))``, contiguous; None where no C++ compiler
        works, which is warned of once.
    """
    query, key, mask = call.query, call.key, call.mask
    kernel = _kernels().get(query.dtype)
    if kernel is None:
        return None
    if call.is_empty:
        return call.empty_rows()
    geometry = _geometry(
        *(query.shape, query.stride(), key.shape, key.stride()),
        *(None, None) if mask is None else (mask.stride(), mask.dtype),
        *(call.query_step, call.is_causal, call.scale, torch.get_num_threads()),
    )
    rows = torch.empty((query.shape[1], len(ATTENTION_COLUMNS)), dtype=torch.float64, device="cpu")
    where = None if mask is None else mask.data_ptr()
    kernel(geometry, query.data_ptr(), key.data_ptr(), where, rows.data_ptr())
    return rows


@functools.lru_cache(maxsize=1024)
def _geometry(
    query_shape: torch.Size,
    query_strides: tuple[int, ...],
    key_shape: torch.Size,
    key_strides: tuple[int, ...],
    mask_strides: tuple[int, ...] | None,
    mask_dtype: torch.dtype | None,
    query_step: int,
    is_causal: bool,
    scale: float,
    threads: int,
) -> Any:
    """A pointer to it; kept, as filling it takes as long as a kernel does for a short sequence."""
    batch, heads, queries, channels = query_shape
    return ctypes.pointer(
        _Geometry(
            query_strides=_Strides(*query_strides),
            key_strides=_Strides(*key_strides),
            mask_strides=_Strides(*mask_strides or ()),
            batch=batch,
            heads=heads,
            key_heads=key_shape[1],
            queries=queries,
            keys=key_shape[2],
            channels=channels,
            mask_type=_MASK_TYPES.index(mask_dtype),
            query_step=query_step,
            is_causal=is_causal,
            threads=threads,
            scale=scale,
        )
    )


@functools.cache
def _kernels() -> dict[torch.dtype, Callable[..., None]]:
    """The kernel of each dtype; none at all without a compiler."""
    return kernels_of(load_library(SOURCES, "measures attention"), ARGUMENTS)
