"""What a kernel reads of a tensor, and the dtype of what it writes."""

from __future__ import annotations

import torch


def packed_dtype(device: torch.device) -> torch.dtype:
    """Float64, which keeps counts above 2**24 exact, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which elements of ``dtype`` are added up at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def real(x: torch.Tensor) -> torch.Tensor:
    """The real floating-point tensor that is measured: magnitudes of complex numbers."""
    if x.is_complex():
        return x.abs()
    return x if x.is_floating_point() else x.to(packed_dtype(x.device))


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
