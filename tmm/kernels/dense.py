"""What a kernel reads of a tensor, and the dtype of what it writes."""

from __future__ import annotations

import functools

import torch

PINNED = ("cuda", "xpu")
"""Devices that read the host's memory where that is pinned, without anybody waiting. Metal shares
its memory with the host, and others may have no such."""


def packed_dtype(device: torch.device) -> torch.dtype:
    """Float64, which keeps counts above 2**24 exact, or float32 on a device without it."""
    lacks = device.type == "mps" or (device.type == "xpu" and not _has_float64(device))
    return torch.float32 if lacks else torch.float64


@functools.cache
def _has_float64(device: torch.device) -> bool:
    """Whether a GPU of Intel computes in float64, as those of laptops do not."""
    if not torch.xpu.is_available():
        return True
    return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which elements of ``dtype`` are added up at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def real(x: torch.Tensor) -> torch.Tensor:
    """The real floating-point tensor that is measured: magnitudes of complex numbers."""
    return x.abs() if x.is_complex() else x.to(real_dtype(x))


def real_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of ``real``."""
    if x.is_complex() or x.is_floating_point():
        return x.dtype.to_real()
    return packed_dtype(x.device)


def on_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Numbers of the host on a device, without waiting for what it does until then."""
    if device.type not in PINNED:
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


def flatten(x: torch.Tensor) -> torch.Tensor:
    """All elements in one dimension, without a copy where they lie densely in any order."""
    return x.as_strided((x.numel(),), (1,)) if is_dense(x) else x.contiguous().view(-1)


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a piece of memory, each one place of it."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
