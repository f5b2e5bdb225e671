"""Tensors that hold others: those that ranks share, and those that a collective will give."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
from torch.distributed.tensor import DTensor

from tmm.core.torch_private import AsyncCollectiveTensor, tree_leaves


def is_wrapper(value: object) -> TypeGuard[torch.Tensor]:
    """Whether it is a ``DTensor``, or what a collective gives, which may be under way."""
    return isinstance(value, (DTensor, AsyncCollectiveTensor))


def held_by(wrapper: Any) -> list[torch.Tensor]:
    """The tensors that a wrapper holds, which may be wrappers again."""
    names, _ = wrapper.__tensor_flatten__()
    held = (getattr(wrapper, name) for name in names)  # with the mesh, in newer versions of torch
    return [value for value in held if isinstance(value, torch.Tensor)]


def innermost(values: object) -> Iterator[Any]:
    """The leaves of nested values, and in place of each wrapper the tensors inside."""
    for leaf in tree_leaves(values):
        if is_wrapper(leaf):
            yield from innermost(held_by(leaf))
        else:
            yield leaf


def like_wrapper(wrapper: Any, like: Callable[[torch.Tensor], object]) -> torch.Tensor:
    """Such a wrapper of what ``like`` gives for each tensor in it; it requires no gradient."""
    names, context = wrapper.__tensor_flatten__()
    held = {name: getattr(wrapper, name) for name in names}
    held |= {name: like(value) for name, value in held.items() if isinstance(value, torch.Tensor)}
    make = type(wrapper).__tensor_unflatten__
    with torch.no_grad():
        made: torch.Tensor = make(held, context, wrapper.shape, wrapper.stride())
        return made.requires_grad_(False)
