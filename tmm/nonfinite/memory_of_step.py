"""The memory of the tensors of a step: what is known of it, and what it held before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tmm.core.rng import RandomState
from tmm.core.torch_private import unsafe_set_version_counter
from tmm.nonfinite.statistics import has_memory


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of a piece of memory.

    ``source`` says what wrote to it last, ``origins`` whose NaN and infinities it may hold, and
    ``is_new`` whether it was made by an operation of the step.
    """

    reference: StorageWeakRef  # as long as it is held, no other memory has the same address
    source: str
    origins: frozenset[int]
    is_new: bool


class Memory:
    """The memory of all tensors of a step, whether it is still in use or not."""

    def __init__(self) -> None:
        self._known: dict[int, Known] = {}

    def of(self, tensor: torch.Tensor) -> Known | None:
        """What is known of the memory of an ordinary tensor."""
        return self._known.get(tensor.untyped_storage()._cdata)

    def remember(
        self, tensor: torch.Tensor, source: str, origins: frozenset[int], *, is_new: bool
    ) -> None:
        """Know this of the memory of a tensor from now on."""
        storage = tensor.untyped_storage()
        self._known[storage._cdata] = Known(StorageWeakRef(storage), source, origins, is_new)

    def meet(self, tensor: torch.Tensor) -> Known:
        """What is known of the memory of a tensor that is used; if nothing, it is from outside."""
        known = self.of(tensor)
        if known is None:
            self.remember(tensor, "", frozenset(), is_new=False)
            known = self.of(tensor)
            assert known is not None
        return known


class Written:
    """Copies of the memory of tensors, made when they are about to be written to."""

    def __init__(self) -> None:
        self._copies: dict[int, tuple[torch.Tensor, torch.UntypedStorage]] = {}
        self._versions: dict[int, tuple[torch.Tensor, int]] = {}

    def know(self, tensor: torch.Tensor) -> None:
        """Remember the version of a tensor: how often it had been written to."""
        if not tensor.is_inference():
            self._versions.setdefault(id(tensor), (tensor, tensor._version))

    def keep(self, tensor: torch.Tensor) -> None:
        """Keep what the whole memory of ``tensor`` holds, unless that was done."""
        if not has_memory(tensor):
            return
        storage = tensor.untyped_storage()
        if storage._cdata not in self._copies:
            self._copies[storage._cdata] = tensor, storage.clone()
        self.know(tensor)

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors whose memory was kept, as they are now."""
        return [tensor for tensor, _ in self._copies.values()]

    def before(self, tensor: torch.Tensor) -> torch.Tensor:
        """What one of ``tensors`` held before."""
        _, copy = self._copies[tensor.untyped_storage()._cdata]
        place = tensor.storage_offset(), tensor.shape, tensor.stride()
        return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(copy, *place)

    def restore(self) -> None:
        """Give every kept tensor its elements and its version back."""
        for tensor, copy in self._copies.values():
            tensor.untyped_storage().copy_(copy)
        for tensor, version in self._versions.values():
            # The elements are the same, so what autograd saved of them is still right.
            unsafe_set_version_counter((tensor,), (version,))
        self._copies.clear()
        self._versions.clear()


@contextmanager
def undisturbed(modules: Iterable[torch.nn.Module], written: Written) -> Iterator[None]:
    """Give back random states, buffers and all that ``written`` keeps, whatever happens."""
    random_state = RandomState.capture()
    found = dict.fromkeys(module for root in modules for module in root.modules())
    members = [(m, dict(m._buffers), dict(m._parameters)) for m in found]
    parameters = dict.fromkeys(p for _, _, own in members for p in own.values() if p is not None)
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    try:
        # Compiled code may write to buffers in ways that nobody sees.
        for _, buffers, _ in members:
            for buffer in buffers.values():
                if buffer is not None:
                    written.keep(buffer)
        yield
    finally:
        for module, own_buffers, own_parameters in members:
            _put_back(module._buffers, own_buffers)
            _put_back(module._parameters, own_parameters)
        for parameter, gradient in gradients:
            if parameter.grad is not gradient:
                parameter.grad = gradient
        written.restore()
        random_state.restore()


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    if list(now) != list(before) or any(now[name] is not before[name] for name in before):
        now.clear()
        now.update(before)
