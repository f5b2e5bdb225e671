"""See inside a PyTorch training run at almost no cost.

``tmm.instrument(torch.compile(model), spec)`` rewrites the graph that Dynamo traces, so that the
statistics of every module are computed inside of it, on the steps that ``spec`` monitors.
"""

from tmm import analysis, sinks
from tmm.alerts import AlertError, AlertWarning
from tmm.coordinate_check import CoordinateCheck, coord_check
from tmm.explain import Explanation
from tmm.gaps import MonitoringWarning
from tmm.instrument import explain, instrument, monitor, remove
from tmm.metrics import HISTOGRAM_EDGES, METRIC_NAMES
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
from tmm.monitor import Monitor
from tmm.nonfinite import Nonfinite, find_nonfinite
from tmm.reader import Run, open_run
from tmm.record import record
from tmm.rules import (
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
from tmm.runs.catalog import RunRecord, list_runs
from tmm.runs.current import finish, init, log, step, watch
from tmm.runs.default_spec import default_spec
from tmm.runs.live import LiveRun
from tmm.runs.start import start_run
from tmm.spec import Spec

__all__ = [
    "HISTOGRAM_EDGES",
    "METRIC_NAMES",
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
    "sinks",
    "start_run",
    "step",
    "update",
    "watch",
]
