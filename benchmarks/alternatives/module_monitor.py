"""torch-module-monitor, uncompiled and under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from benchmarks.alternatives.interface import EAGER, Alternative, Attached, compile_alone
from benchmarks.five import METRICS

PACKAGE = "torch_module_monitor"


def attach(module: nn.Module, *, compiled: bool) -> Attached:
    """Give it the model; a compiled one after compiling, whose names it knows how to write."""
    from torch_module_monitor import ModuleMonitor  # type: ignore[import-not-found,unused-ignore]

    monitor = ModuleMonitor(monitor_step_fn=lambda step: True)
    model = compile_alone(module) if compiled else module
    monitor.set_module(model)
    for name, metric in METRICS.items():
        monitor.add_activation_metric(name, metric)

    def begin() -> None:
        monitor.begin_step((monitor.current_step or 0) + 1)

    def read() -> Mapping[str, float]:
        monitor.end_step()
        metrics: Mapping[str, float] = monitor.get_step_metrics()
        return {key.removeprefix("activation/"): value for key, value in metrics.items()}

    return Attached(module, model, read, begin)


ALTERNATIVES = (
    Alternative(
        "torch-module-monitor",
        "its hooks, uncompiled",
        partial(attach, compiled=False),
        EAGER,
        PACKAGE,
    ),
    Alternative(
        "torch-module-monitor, compiled",
        "its hooks under torch.compile",
        partial(attach, compiled=True),
        package=PACKAGE,
    ),
)
