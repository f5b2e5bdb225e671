"""See inside a PyTorch training run at almost no cost.

``tmm.instrument(torch.compile(model), spec)`` rewrites the graph that Dynamo traces, so that the
statistics of every module are computed inside of it, on the steps that ``spec`` monitors.

What the package offers is imported when it is first asked for: whoever only reads runs does not
wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tmm import analysis, sinks
    from tmm.coordinate_check import CoordinateCheck, coord_check
    from tmm.core.failures import MonitoringWarning
    from tmm.core.metrics import HISTOGRAM_EDGES, METRIC_NAMES
    from tmm.instrumentation.record import record
    from tmm.module_monitor import (
        HooksManager,
        ModuleMonitor,
        MonitorMixin,
        RefinedCoordinateCheck,
        StorageManager,
        default_format_module_name_fn,
        l2_norm,
        monitor_scaled_dot_product_attention,
    )
    from tmm.nonfinite import Nonfinite, find_nonfinite
    from tmm.runs.catalog import list_runs
    from tmm.runs.current import finish, init, log, step, watch
    from tmm.runs.instrument import explain, instrument, monitor, remove
    from tmm.runs.live import LiveRun
    from tmm.runs.recorded_run import Run, open_run
    from tmm.runs.run_record import RunRecord
    from tmm.runs.start import start_run
    from tmm.spec.alerts import AlertError, AlertWarning
    from tmm.spec.default import default_spec
    from tmm.spec.rules import (
        Rule,
        activation,
        activation_difference,
        activation_gradient,
        attention,
        gradient,
        optimizer_state,
        parameter,
        parameter_difference,
        rcc,
        update,
    )
    from tmm.spec.spec import Spec
    from tmm.steps.agreement import Agreement, replicas_agree
    from tmm.steps.explanation import Explanation
    from tmm.steps.monitor import Monitor

__all__ = [
    "HISTOGRAM_EDGES",
    "METRIC_NAMES",
    "Agreement",
    "AlertError",
    "AlertWarning",
    "CoordinateCheck",
    "Explanation",
    "HooksManager",
    "LiveRun",
    "ModuleMonitor",
    "Monitor",
    "MonitorMixin",
    "MonitoringWarning",
    "Nonfinite",
    "RefinedCoordinateCheck",
    "Rule",
    "Run",
    "RunRecord",
    "Spec",
    "StorageManager",
    "activation",
    "activation_difference",
    "activation_gradient",
    "analysis",
    "attention",
    "coord_check",
    "default_format_module_name_fn",
    "default_spec",
    "explain",
    "find_nonfinite",
    "finish",
    "gradient",
    "init",
    "instrument",
    "l2_norm",
    "list_runs",
    "log",
    "monitor",
    "monitor_scaled_dot_product_attention",
    "open_run",
    "optimizer_state",
    "parameter",
    "parameter_difference",
    "rcc",
    "record",
    "remove",
    "replicas_agree",
    "sinks",
    "start_run",
    "step",
    "update",
    "watch",
]

_NAMES = {
    "spec.alerts": ("AlertError", "AlertWarning"),
    "coordinate_check": ("CoordinateCheck", "coord_check"),
    "steps.explanation": ("Explanation",),
    "core.failures": ("MonitoringWarning",),
    "runs.instrument": ("explain", "instrument", "monitor", "remove"),
    "core.metrics": ("HISTOGRAM_EDGES", "METRIC_NAMES"),
    "module_monitor": (
        "HooksManager",
        "ModuleMonitor",
        "MonitorMixin",
        "RefinedCoordinateCheck",
        "StorageManager",
        "default_format_module_name_fn",
        "l2_norm",
        "monitor_scaled_dot_product_attention",
    ),
    "steps.monitor": ("Monitor",),
    "nonfinite": ("Nonfinite", "find_nonfinite"),
    "runs.recorded_run": ("Run", "open_run"),
    "instrumentation.record": ("record",),
    "spec.rules": (
        "Rule",
        "activation",
        "activation_difference",
        "activation_gradient",
        "attention",
        "gradient",
        "optimizer_state",
        "parameter",
        "parameter_difference",
        "rcc",
        "update",
    ),
    "runs.catalog": ("list_runs",),
    "runs.run_record": ("RunRecord",),
    "runs.current": ("finish", "init", "log", "step", "watch"),
    "spec.default": ("default_spec",),
    "runs.live": ("LiveRun",),
    "runs.start": ("start_run",),
    "spec.spec": ("Spec",),
    "steps.agreement": ("Agreement", "replicas_agree"),
}
_HOMES = MappingProxyType({name: module for module, names in _NAMES.items() for name in names})
"""The module that each name comes from."""


class _Package(ModuleType):
    """The package, with what it offers once that is asked for."""

    def __getattr__(self, name: str) -> object:
        """What ``__all__`` names, or a module of the package; raises AttributeError."""
        found: object
        if name in _HOMES:
            found = getattr(import_module(f"tmm.{_HOMES[name]}"), name)
        elif not name.startswith("_") and name.isidentifier() and find_spec(f"tmm.{name}"):
            found = import_module(f"tmm.{name}")
        else:
            message = f"module 'tmm' has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=self)
        self.__dict__[name] = found
        return found

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
