"""Rows of partial sums on a CPU, by ``host.cpp``, compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tmm.metrics import COLUMN_ORDER

_SOURCE = Path(__file__).with_name("host.cpp")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def summarize_on_host(
    tensors: Sequence[torch.Tensor],
    columns: tuple[str, ...],
    subtracted: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """One row of partial sums per tensor.

    Args:
        tensors: One-dimensional, contiguous and of one floating-point dtype, on the CPU.
        subtracted: As many of the same dtype and sizes; rows are then of the differences, taken in
            float32 at least.
        columns: Names from ``tmm.metrics.COLUMN_ORDER``.

    Returns:
        Float64, shape ``(len(tensors), len(columns))``; None where there is no such kernel: for
        the dtype, or because no C++ compiler works, which is warned of once.
    """
    dtype = tensors[0].dtype
    kernel = _kernels().get(dtype)
    if kernel is None:
        return None
    pointers = ctypes.c_int64 * len(tensors)
    rows = torch.empty(len(tensors), len(columns), dtype=torch.float64)
    kernel(
        len(tensors),
        pointers(*[tensor.data_ptr() for tensor in tensors]),
        None if subtracted is None else pointers(*[tensor.data_ptr() for tensor in subtracted]),
        pointers(*[tensor.numel() for tensor in tensors]),
        len(columns),
        _order(columns),
        "moment4" in columns,
        torch.get_num_threads(),
        rows.data_ptr(),
    )
    return rows


@functools.cache
def _order(columns: tuple[str, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(columns))(*[COLUMN_ORDER.index(name) for name in columns])


@functools.cache
def _kernels() -> dict[torch.dtype, Callable[..., None]]:
    """The kernel of each dtype; none at all without a compiler."""
    from torch._inductor.codecache import CppCodeCache  # slow to import
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        library = CppCodeCache.load(_SOURCE.read_text())
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        warnings.warn(
            "tmm measures on the CPU with plain torch operations, which is slower, because its "
            f"kernel could not be compiled: {str(error).strip().splitlines()[0]}",
            stacklevel=2,
        )
        return {}
    kernels = {}
    for dtype in _DTYPES:
        kernel = getattr(library, f"summarize_{str(dtype).removeprefix('torch.')}")
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        kernel.argtypes = [
            *(integer, pointer, pointer, pointer, integer, pointer, integer, integer, pointer)
        ]
        kernel.restype = None
        kernels[dtype] = kernel
    return kernels
