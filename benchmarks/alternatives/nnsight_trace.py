"""nnsight: every module's output read inside of a trace."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.alternatives.interface import (
    EAGER,
    Alternative,
    Attached,
    compile_alone,
)
from benchmarks.five import five, named


def attach(module: nn.Module, *, compiled: bool) -> Attached:
    """Trace each forward pass; outputs are asked for in the order of execution, as it wants."""
    from nnsight import NNsight  # type: ignore[import-not-found,unused-ignore]

    model = NNsight(compile_alone(module) if compiled else module)
    names: list[str] = []
    latest: list[torch.Tensor] = []

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        if not names:
            names.extend(execution_order(module, tokens))
        points = [_point(model._orig_mod if compiled else model, name) for name in names]
        with model.trace(tokens):
            rows = [five(point.output) for point in points]
            values = torch.stack(rows).save()
            output = model.output.save()
        latest[:] = [values]
        result: torch.Tensor = output
        return result

    def read() -> Mapping[str, float]:
        return named(names, latest[0])

    return Attached(module, forward, read)


def execution_order(module: nn.Module, tokens: torch.Tensor) -> list[str]:
    """The names of all modules in the order in which their forwards end."""
    order: list[str] = []

    def note(name: str, module: nn.Module, inputs: object, output: object) -> None:
        order.append(name)

    handles = [
        child.register_forward_hook(partial(note, name)) for name, child in module.named_modules()
    ]
    with torch.no_grad():
        module(tokens)
    for handle in handles:
        handle.remove()
    return order


def _point(model: Any, name: str) -> Any:
    for part in name.split(".") if name else ():
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


ALTERNATIVES = (
    Alternative("nnsight", "one trace per step", partial(attach, compiled=False), EAGER, "nnsight"),
    Alternative(
        "nnsight, compiled",
        "one trace per step around the compiled model",
        partial(attach, compiled=True),
        package="nnsight",
    ),
)
