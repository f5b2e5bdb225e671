"""Statistics of attention on a CPU, by ``attention_host.cpp``, compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from tmm.kernels.attention import AttentionCall

_SOURCE = Path(__file__).with_name("attention_host.cpp")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MASK_TYPES = (None, torch.bool, *_DTYPES)  # in the order of `mask_reader` in the source

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
    from torch._inductor.codecache import CppCodeCache  # slow to import
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        library = CppCodeCache.load(_SOURCE.read_text())
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        warnings.warn(
            "tmm measures attention on the CPU with plain torch operations, which is slower, "
            f"because its kernel could not be compiled: {str(error).strip().splitlines()[0]}",
            stacklevel=2,
        )
        return {}
    kernels = {}
    for dtype in _DTYPES:
        kernel = getattr(library, f"summarize_{str(dtype).removeprefix('torch.')}")
        kernel.argtypes = [ctypes.POINTER(_Call)]
        kernel.restype = None
        kernels[dtype] = kernel
    return kernels
