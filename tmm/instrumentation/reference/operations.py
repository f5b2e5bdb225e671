"""What an operation gives and writes to, and where that lies in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import torch

from tmm.core.torch_private import OpOverload, wait_tensor
from tmm.core.wrapped_tensors import innermost
from tmm.spec.module_state import is_plain

Place: TypeAlias = tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype]
"""Where in memory the elements of a tensor lie."""


def difference(func: Any, result: object, counterpart: object) -> str:
    """What of two results can take the program another way, or cannot be followed; else empty."""
    own, others = list(innermost(result)), list(innermost(counterpart))
    if len(own) != len(others):
        return f"{func} gave {len(own)} tensors, in the reference {len(others)}"
    for value, other in zip(own, others, strict=True):
        if not isinstance(value, torch.Tensor):
            if value != other and not (value != value and other != other):
                return (
                    f"the program read {value!r} from a tensor, which is {other!r} in the reference"
                )
        elif not is_followed(value):
            return f"{func} gave a {type(value).__name__} of layout {value.layout}"
        elif (value.shape, value.dtype) != (other.shape, other.dtype):
            return (
                f"{func} gave a tensor of shape {tuple(value.shape)}, in the reference of shape"
                f" {tuple(other.shape)}"
            )
    return ""


def followed_in(values: object) -> Iterator[torch.Tensor]:
    """The ordinary tensors in nested values; of a ``DTensor`` what this rank has of it."""
    return filter(is_followed, innermost(values))


def is_followed(value: object) -> bool:
    """Whether a value is an ordinary tensor, whose memory can be looked at."""
    return isinstance(value, torch.Tensor) and is_plain(value)


def place_of(tensor: torch.Tensor) -> Place:
    """Where in memory a tensor lies."""
    storage, offset = tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    return storage, offset, tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype


def awaited(func: Any, result: object) -> None:
    """Wait for the tensors of a collective: nobody else reads those of the reference."""
    if func.namespace == "_c10d_functional":
        for tensor in followed_in(result):
            wait_tensor(tensor)  # type: ignore[no-untyped-call]


def written_by(func: Any, args: Sequence[Any], kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that an operation writes to, with the names of the arguments."""
    if not isinstance(func, OpOverload):
        return
    arguments = func._schema.arguments
    values = {a.name: value for a, value in zip(arguments, args, strict=False)} | kwargs
    for argument in arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for tensor in followed_in(values.get(argument.name)):
                yield argument.name, tensor
