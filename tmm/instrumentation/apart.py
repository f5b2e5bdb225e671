"""Measuring that the program around does not see, whatever it runs under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes

from tmm.kernels.ops import why_unmeasurable


def runs_under_modes() -> bool:
    """Whether the program runs under modes or transforms, which see each operation."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or _functorch.peek_interpreter_stack() is not None
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
        if _functorch.peek_interpreter_stack() is not None:
            stack.enter_context(temporarily_clear_interpreter_stack())
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        modes = map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))
        if not all(isinstance(mode, DeviceContext) for mode in modes):
            stack.enter_context(torch._C.DisableTorchFunction())
        yield


def why_no_values(tensor: torch.Tensor) -> str | None:
    """Why a tensor that a program has just computed cannot be measured; None if it can."""
    if type(tensor) is not torch.Tensor and isinstance(tensor, FakeTensor):
        return "a fake tensor, which has no values"
    if tensor.is_meta:
        return "a meta tensor, which has no values"
    inner = tensor
    while _functorch.is_functorch_wrapped_tensor(inner):
        if _functorch.is_batchedtensor(inner):
            return "inside torch.func.vmap"
        inner = _functorch.get_unwrapped(inner)
    return why_unmeasurable(inner)


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a tensor, without gradients, transforms and nesting."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    tensor = tensor.detach()
    return tensor.values() if tensor.is_nested else tensor
