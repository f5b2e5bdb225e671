"""No monitor: the limit of what is possible, and the programs that the others add to."""

from __future__ import annotations

from torch import nn

from benchmarks.alternatives.interface import (
    AOT_EAGER,
    COMPILED,
    EAGER,
    Alternative,
    Attached,
    compile_alone,
)


def compiled(module: nn.Module) -> Attached:
    """The compiled model."""
    return Attached(module, compile_alone(module))


def traced(module: nn.Module) -> Attached:
    """The compiled model with the kernels of uncompiled torch."""
    return Attached(module, compile_alone(module, "aot_eager"))


def uncompiled(module: nn.Module) -> Attached:
    """The model as it is."""
    return Attached(module, module)


ALTERNATIVES = (
    Alternative(COMPILED, "no monitor", compiled, same_work=False, leaves_model=True),
    Alternative(AOT_EAGER, "no monitor, uncompiled kernels", traced, AOT_EAGER, same_work=False),
    Alternative(EAGER, "no monitor", uncompiled, EAGER, same_work=False),
)
