"""Rows of partial sums on a CPU, by ``host.cpp``, compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

from tmm.kernels.host_library import load_kernels
from tmm.metrics import COLUMN_ORDER, COLUMN_SEPARATOR

_SOURCE = "host.cpp"


def summarize_on_host(
    tensors: Sequence[torch.Tensor],
    columns: tuple[str, ...],
    subtracted: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """One row of partial sums per tensor.

    Args:
        tensors: On the CPU, dense in memory, and of one floating-point dtype.
        subtracted: As many of the same dtype and sizes, their elements in the same order; rows are
            then of the differences, taken in float32 at least, and of the pairs.
        columns: Names from ``tmm.metrics.COLUMN_ORDER``.

    Returns:
        Float64, shape ``(len(tensors), len(columns))``; None where there is no such kernel: for
        the dtype, or because no C++ compiler works, which is warned of once.
    """
    kernel = _kernels().get(tensors[0].dtype)
    if kernel is None:
        return None
    rows = torch.empty(len(tensors), len(columns), dtype=torch.float64, device="cpu")
    integers = ctypes.c_int64 * len(tensors)
    kernel(
        len(tensors),
        integers(*[tensor.data_ptr() for tensor in tensors]),
        None if subtracted is None else integers(*[tensor.data_ptr() for tensor in subtracted]),
        integers(*[tensor.numel() for tensor in tensors]),
        len(columns),
        _order(columns),
        torch.get_num_threads(),
        rows.data_ptr(),
    )
    return rows


def summarize_one_on_host(tensor: torch.Tensor, columns: str) -> torch.Tensor | None:
    """The row of ``summarize_on_host`` of one tensor, shape ``(columns,)``.

    ``columns`` are joined by ``COLUMN_SEPARATOR``. After a large operation nothing that Python
    touches is in the caches: there is as little of it here as can be.
    """
    kernel = _kernels_of_one().get(tensor.dtype)
    if kernel is None:
        return None
    order = _order_of_joined(columns)
    width = len(order)
    row = torch.empty(width, dtype=torch.float64, device="cpu")
    threads = torch.get_num_threads()
    kernel(tensor.data_ptr(), tensor.numel(), width, order, threads, row.data_ptr())
    return row


@functools.cache
def _order(columns: tuple[str, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(columns))(*[COLUMN_ORDER.index(name) for name in columns])


@functools.cache
def _order_of_joined(columns: str) -> ctypes.Array[ctypes.c_int64]:
    return _order(tuple(columns.split(COLUMN_SEPARATOR)))


@functools.cache
def _kernels() -> dict[torch.dtype, Callable[..., None]]:
    """The kernel of each dtype; none at all without a compiler."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    types = (integer, pointer, pointer, pointer, integer, pointer, integer, pointer)
    return load_kernels(_SOURCE, types, "measures")


@functools.cache
def _kernels_of_one() -> dict[torch.dtype, Callable[..., None]]:
    """The kernel of each dtype for one tensor."""
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    if not _kernels():
        return {}
    types = (integer, integer, integer, pointer, integer, pointer)
    return load_kernels(_SOURCE, types, "measures", suffix="_one")
