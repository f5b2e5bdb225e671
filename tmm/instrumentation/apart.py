"""Measuring that the program around does not see, whatever it runs under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from tmm.core.torch_private import (
    DeviceContext,
    DisableTorchFunction,
    FakeTensor,
    disable_current_modes,
    get_function_stack_at,
    is_batched,
    len_torch_dispatch_stack,
    len_torch_function_stack,
    peek_interpreter_stack,
    temporarily_clear_interpreter_stack,
    without_transforms,
)
from tmm.kernels.unreadable import why_unmeasurable


def runs_under_modes() -> bool:
    """Whether the program runs under modes or transforms, which see each operation."""
    return bool(
        len_torch_dispatch_stack()
        or len_torch_function_stack()
        or peek_interpreter_stack() is not None
    )


@contextmanager
def apart_from_the_program() -> Iterator[None]:
    """Hide operations in the block from the modes and transforms of the program.

    A default device is left as it is: functions of users may need it.
    """
    if not runs_under_modes():
        yield
        return
    with ExitStack() as stack:
        if peek_interpreter_stack() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        if len_torch_dispatch_stack():
            stack.enter_context(disable_current_modes())
        modes = map(get_function_stack_at, range(len_torch_function_stack()))
        if not all(isinstance(mode, DeviceContext) for mode in modes):
            stack.enter_context(DisableTorchFunction())
        yield


def why_no_values(tensor: torch.Tensor) -> str | None:
    """Why a tensor that a program has just computed cannot be measured; None if it can."""
    if type(tensor) is not torch.Tensor and isinstance(tensor, FakeTensor):
        return "a fake tensor, which has no values"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    if is_batched(tensor):
        return "inside torch.func.vmap"
    return why_unmeasurable(without_transforms(tensor))


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor, without gradients, transforms and nesting."""
    tensor = without_transforms(tensor).detach()
    return tensor.values() if tensor.is_nested else tensor
