"""The tensors that a model holds under names, which may be other tensors at each look."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tmm.core.module_names import ParameterNames

_OF_TORCH = frozenset(torch.nn.Module().__dict__)
_HOLDS = (torch.Tensor, list, tuple, dict)
_MOST_ITEMS = 64  # of a container; longer ones are records of the past, which nobody computes with


class ModelState:
    """Gives each tensor of a module with its dotted name, whenever it is asked.

    Parameters come first, then, with ``everything``, buffers and the attributes of modules that
    are tensors or hold some, as in ``blocks.0.cache[k]``.
    """

    def __init__(self, module: torch.nn.Module, *, everything: bool) -> None:
        self._names = ParameterNames(module)
        self._everything = everything

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each name with its tensor; one that has several names comes under each of them."""
        owners = self._names.owners()
        for owner, prefix in owners:
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    yield prefix + name, parameter
        if not self._everything:
            return
        for owner, prefix in owners:
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    yield prefix + name, buffer
        for owner, prefix in owners:
            for name, value in owner.__dict__.items():
                if isinstance(value, _HOLDS) and name not in _OF_TORCH:
                    yield from _within(prefix + name, value)


def _within(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        if is_plain(value):
            yield name, value
    elif isinstance(value, (list, tuple)) and len(value) <= _MOST_ITEMS:
        for position, item in enumerate(value):
            if isinstance(item, _HOLDS):
                yield from _within(f"{name}[{position}]", item)
    elif isinstance(value, dict) and len(value) <= _MOST_ITEMS:
        for key, item in value.items():
            if isinstance(item, _HOLDS):
                yield from _within(f"{name}[{key}]", item)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether it is an ordinary tensor, whose memory can be looked at."""
    plain = type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    return plain and tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_meta)
