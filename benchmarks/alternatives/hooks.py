"""Forward hooks: uncompiled, and registered before ``torch.compile``, which traces them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from benchmarks.alternatives.interface import (
    EAGER,
    Alternative,
    Attached,
    compile_alone,
)
from benchmarks.five import five, measured_modules, named

Hook = Callable[[nn.Module, object, torch.Tensor], None]


def uncompiled(module: nn.Module) -> Attached:
    """Hooks that keep the five statistics of each output, read back once per step."""
    names: list[str] = []
    rows: list[torch.Tensor] = []

    def measure(name: str, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        names.append(name)
        rows.append(five(output))

    for name, child in measured_modules(module).items():
        child.register_forward_hook(partial(measure, name))

    def read() -> Mapping[str, float]:
        values = named(names, torch.stack(rows))
        names.clear()
        rows.clear()
        return values

    return Attached(module, module, read)


def into_buffer(
    module: nn.Module, make: Callable[[torch.Tensor, int], Hook], backend: str = "inductor"
) -> Attached:
    """Compile a model with a hook on each module, which writes the row of that number."""
    children = measured_modules(module)
    buffer = torch.zeros(len(children), 5, device=next(module.parameters()).device)
    for index, child in enumerate(children.values()):
        child.register_forward_hook(make(buffer, index))
    model = compile_alone(module, backend)
    return Attached(module, model, lambda: named(list(children), buffer))


def _traced_hook(buffer: torch.Tensor, index: int) -> Hook:
    def measure(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        buffer[index] = five(output)

    return measure


ALTERNATIVES = (
    Alternative("forward hooks", "five calls of torch per tensor", uncompiled, EAGER),
    Alternative(
        "hooks before torch.compile",
        "traced: Inductor compiles the statistics; written into a buffer",
        partial(into_buffer, make=_traced_hook),
    ),
)
