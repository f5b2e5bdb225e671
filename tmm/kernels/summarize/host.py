"""Rows of partial sums on a CPU, by ``host.cpp``, compiled once per machine.

Loading it also registers ``tmm::summarize`` of a CPU, by ``host_operator.cpp``, and ``tmm::merge``.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import torch

from tmm.core.metrics import COLUMN_ORDER
from tmm.kernels.build import VECTORS, kernels_of, load_library
from tmm.kernels.dense import flatten

SOURCES = (VECTORS, "summarize/host.cpp", "summarize/host_operator.cpp", "fused/merge.cpp")

_Pointer, _Integer = ctypes.c_void_p, ctypes.c_int64
ARGUMENTS = (_Integer, *[_Pointer] * 3, _Integer, _Pointer, _Integer, _Pointer)
"""The types of what a kernel is called with, as in ``rows_by``."""


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
        columns: Names from ``tmm.core.metrics.COLUMN_ORDER``.

    Returns:
        Float64, shape ``(len(tensors), len(columns))``; None where there is no such kernel: for
        the dtype, or because no C++ compiler works, which is warned of once.
    """
    kernel = _kernels().get(tensors[0].dtype)
    return None if kernel is None else rows_by(kernel, tensors, columns, subtracted)


def rows_by(
    kernel: Callable[..., None],
    tensors: Sequence[torch.Tensor],
    columns: tuple[str, ...],
    subtracted: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """The rows of ``summarize_on_host``, by the kernel of the dtype of the tensors."""
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


def summarize_one_on_host(x: torch.Tensor, columns: tuple[str, ...]) -> torch.Tensor | None:
    """The row of a real tensor of the CPU, of any strides; None as in ``summarize_on_host``."""
    rows = summarize_on_host([flatten(x)], columns)
    return None if rows is None else rows[0]


def load_operators() -> bool:
    """Register the operators of a CPU that are written in C++; whether there are any."""
    return bool(_kernels())


@functools.cache
def _order(columns: tuple[str, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(columns))(*[COLUMN_ORDER.index(name) for name in columns])


@functools.cache
def _kernels() -> dict[torch.dtype, Callable[..., None]]:
    """The kernel of each dtype; none at all without a compiler."""
    return kernels_of(load_library(SOURCES, "measures"), ARGUMENTS)
