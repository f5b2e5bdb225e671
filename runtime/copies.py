"""Copies of many tensors in few allocations, since a CPU faults in their pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from tmm.kernels.dense import is_dense

_MOST_BYTES = 1 << 26  # of an allocation for several: a whole model may not fit in one piece
_ALIGNMENT = 64  # elements


def copies_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A copy of each tensor, with its strides where it lies densely in memory."""
    copies: dict[str, torch.Tensor] = {}
    together: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        plain = tensor.detach()
        if type(plain) is torch.Tensor and plain.layout is torch.strided and is_dense(plain):
            together.setdefault((plain.device, plain.dtype), {})[name] = plain
        else:
            copies[name] = plain.clone()
    for alike in together.values():
        for part in _parts(alike):
            copies |= _copied(part)
    return copies


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sizes = [-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
    memory = _memory(next(iter(tensors.values())), sum(sizes))
    views = [
        piece.as_strided(tensor.shape, tensor.stride())
        for tensor, piece in zip(tensors.values(), memory.split(sizes), strict=True)
    ]
    torch._foreach_copy_(views, list(tensors.values()))
    return dict(zip(tensors, views, strict=True))


def _memory(like: torch.Tensor, size: int) -> torch.Tensor:
    if like.device.type != "cpu":
        return like.new_empty(size)
    # NumPy asks for huge pages: a page is faulted in for 2 MiB instead of 4 KiB.
    memory = np.empty(max(size, 1) * like.element_size(), np.uint8)
    return torch.from_numpy(memory).view(like.dtype)[:size]


def _parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        own = tensor.numel() * tensor.element_size()
        if part and size + own > _MOST_BYTES:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += own
    if part:
        yield part
