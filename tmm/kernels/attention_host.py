"""Statistics of attention on a CPU, by ``attention_host.cpp``, compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch

from tmm.kernels.attention_call import AttentionCall
from tmm.kernels.host_library import DTYPES, load_kernels

_SOURCE = "attention_host.cpp"
_MASK_TYPES = (None, torch.bool, *DTYPES)  # in the order of `mask_reader` in the source

_Integer, _Pointer = ctypes.c_int64, ctypes.c_void_p
_Strides = _Integer * 4


class _Call(ctypes.Structure):
    """``Call`` of the source."""

    _fields_ = (
        *((name, _Pointer) for name in ("query", "key", "mask")),
        *((name, _Strides) for name in ("query_strides", "key_strides", "mask_strides")),
        *((name, _Integer) for name in ("batch", "heads", "key_heads", "queries", "keys")),
        *((name, _Integer) for name in ("channels", "mask_type", "query_step", "is_causal")),
        ("threads", _Integer),
        ("scale", ctypes.c_double),
        ("result", _Pointer),
    )


def summarize_attention_on_host(call: AttentionCall) -> torch.Tensor | None:
    """The rows of ``summarize_attention``; what it allocates is linear in the sequence length.

    Returns:
        Float64, shape ``(heads, len(ATTENTION_COLUMNS))``; None where no C++ compiler works,
        which is warned of once.
    """
    kernel = _kernels().get(call.query.dtype)
    if kernel is None:
        return None
    rows = call.empty_rows()
    if call.is_empty:
        return rows
    query, key, mask = call.query, call.key, call.mask
    assert rows.is_contiguous()
    arguments = _Call(
        query=query.data_ptr(),
        key=key.data_ptr(),
        mask=None if mask is None else mask.data_ptr(),
        query_strides=_Strides(*query.stride()),
        key_strides=_Strides(*key.stride()),
        mask_strides=_Strides(*([] if mask is None else mask.stride())),
        batch=query.shape[0],
        heads=query.shape[1],
        key_heads=key.shape[1],
        queries=query.shape[2],
        keys=key.shape[2],
        channels=query.shape[3],
        mask_type=_MASK_TYPES.index(None if mask is None else mask.dtype),
        query_step=call.query_step,
        is_causal=call.is_causal,
        threads=torch.get_num_threads(),
        scale=call.scale,
        result=rows.data_ptr(),
    )
    kernel(ctypes.byref(arguments))
    return rows


@functools.cache
def _kernels() -> dict[torch.dtype, Callable[..., None]]:
    """The kernel of each dtype; none at all without a compiler."""
    return load_kernels(_SOURCE, (ctypes.POINTER(_Call),), "measures attention")
