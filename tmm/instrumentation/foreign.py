"""Passes that trace or transform a model instead of training it; nothing of them is measured.

What they compute are no numbers (``torch.export``, fake tensors, tensors on the meta device) or
numbers of another program (``torch.func``: one row for each sample, say).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch

from tmm.core.torch_private import (
    DispatchModeKey,
    FakeTensor,
    TransformType,
    get_dispatch_mode,
    get_interpreter_stack,
    get_tracing_state,
    is_functorch_wrapped_tensor,
    is_fx_symbolic_tracing,
    len_torch_dispatch_stack,
)

PASSED_BY = "what traces or transforms the model runs the user's own program, unmeasured"

_MODES = {
    DispatchModeKey.PROXY: "make_fx",
    DispatchModeKey.FAKE: "fake tensors",
    DispatchModeKey.FUNCTIONAL: "functionalization",
}


_TRANSFORMS = {
    TransformType.Vmap: "vmap",
    TransformType.Functionalize: "functionalize",
}


def transform() -> str | None:
    """The transform of ``torch.func`` that gives no numbers of the model itself, if one is at work.

    Derivatives do: their forward passes compute what those of a training compute.
    """
    for interpreter in get_interpreter_stack() or ():
        if interpreter.key() in _TRANSFORMS:
            return f"torch.func.{_TRANSFORMS[interpreter.key()]}"
    return None


def foreign_pass() -> str | None:
    """What traces or transforms a forward pass that begins now; None for one that just runs."""
    if torch.compiler.is_exporting():
        return "torch.export"
    if get_tracing_state() is not None:
        return "torch.jit.trace"
    if (found := transform()) is not None:
        return found
    if len_torch_dispatch_stack():
        for key, name in _MODES.items():
            if get_dispatch_mode(key) is not None:
                return name
    return "torch.fx.symbolic_trace" if is_fx_symbolic_tracing() else None


def foreign_inputs(args: Iterable[object], kwargs: Mapping[str, object]) -> str | None:
    """What a pass is for, judged by what it is called with; None for one that just runs.

    Derivatives by the inputs are not those of a training, which are by the parameters.
    """
    for value in (*_leaves(args), *_leaves(kwargs)):
        if isinstance(value, FakeTensor):
            return "fake tensors"
        if value.is_meta:
            return "tensors on the meta device"
        if is_functorch_wrapped_tensor(value):
            return "a derivative by its inputs (torch.func)"
    return None


def _leaves(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, Mapping)):  # which an abstract class takes longer to say
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
