"""tmm on the compiled model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

import tmm
from benchmarks.alternatives.interface import Alternative, Attached, compile_alone
from benchmarks.workloads import FIVE_METRICS

PREFIX = "activation/"


def attach(module: nn.Module) -> Attached:
    """Instrument the compiled model; each step is monitored."""
    model = tmm.instrument(compile_alone(module), tmm.Spec(tmm.activation(*FIVE_METRICS)))
    monitor = tmm.monitor(model)

    def begin() -> None:
        monitor.begin_step((monitor.current_step or 0) + 1)

    def read() -> Mapping[str, float]:
        monitor.end_step()
        metrics = monitor.get_step_metrics()
        return {key.removeprefix(PREFIX): float(value) for key, value in metrics.items()}

    return Attached(module, model, read, begin)


ALTERNATIVES = (Alternative("tmm", "in the compiled graph", attach, leaves_model=True),)
