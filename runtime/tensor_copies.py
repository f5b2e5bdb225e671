"""Copies of many tensors in few allocations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from tmm.core.torch_private import foreach_copy_
from tmm.kernels.dense import is_dense

_MOST = 1 << 24  # elements of a part: few enough parts, and 64 MiB in float32
_ALIGNMENT = 64  # elements


class Copies:
    """Copies of tensors, whose memory on a CPU is kept for the next ones.

    A CPU takes as long to fault in the pages of fresh memory as to copy; an accelerator's allocator
    keeps memory by itself.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[torch.dtype, int], torch.Tensor] = {}
        self._last: dict[str, torch.Tensor] = {}

    def of(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A copy of each tensor, with its strides where it lies densely in memory.

        The copies last until the next call.
        """
        if (
            self._last
            and tensors.keys() == self._last.keys()
            and all(_lies_alike(tensor, self._last[name]) for name, tensor in tensors.items())
        ):
            with torch.no_grad():
                foreach_copy_([self._last[name] for name in tensors], list(tensors.values()))
            return dict(self._last)
        copies: dict[str, torch.Tensor] = {}
        own: dict[str, torch.Tensor] = {}  # in memory of their own
        together: dict[tuple[torch.device, torch.dtype], dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            plain = tensor.detach()
            if type(plain) is torch.Tensor and plain.layout is torch.strided and is_dense(plain):
                together.setdefault((plain.device, plain.dtype), {})[name] = plain
            else:
                own[name] = plain.clone()
        for alike in together.values():
            for index, part in enumerate(parts_of(alike)):
                copies |= self._copied(part, index)
        are_kept = all(device.type == "cpu" for device, _ in together) and not own
        self._last = dict(copies) if are_kept else {}
        return own | copies

    def _copied(self, tensors: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
        sizes = [-(-tensor.numel() // _ALIGNMENT) * _ALIGNMENT for tensor in tensors.values()]
        memory = self._memory(next(iter(tensors.values())), index, sum(sizes))
        views = [
            piece.as_strided(tensor.shape, tensor.stride())
            for tensor, piece in zip(tensors.values(), memory.split(sizes), strict=True)
        ]
        foreach_copy_(views, list(tensors.values()))
        return dict(zip(tensors, views, strict=True))

    def _memory(self, like: torch.Tensor, index: int, size: int) -> torch.Tensor:
        if like.device.type != "cpu":
            return like.new_empty(size)
        key = (like.dtype, index)
        if key not in self._kept or self._kept[key].numel() < size:
            with torch.inference_mode(False):  # else it could not be written to outside of that
                self._kept[key] = like.new_empty(size)
        return self._kept[key][:size]


def _lies_alike(tensor: torch.Tensor, copy: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and tensor.shape == copy.shape
        and tensor.stride() == copy.stride()
        and tensor.dtype is copy.dtype
        and tensor.device == copy.device
    )


def parts_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors in groups that are not large together."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if part and size + tensor.numel() > _MOST:
            yield part
            part, size = {}, 0
        part[name] = tensor
        size += tensor.numel()
    if part:
        yield part


def bounded_parts(tensors: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """All tensors of a CPU together; of another device groups that are not large together.

    There what is made of each is as large as they are, and memory that lacks ends the training.
    """
    if all(tensor.is_cpu for tensor in tensors.values()):
        yield dict(tensors)
    else:
        yield from parts_of(tensors)
