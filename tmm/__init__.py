"""See inside a PyTorch training run at almost no cost.

``tmm.instrument(torch.compile(model), spec)`` rewrites the graph that Dynamo traces, so that the
statistics of every module are computed inside of it, on the steps that ``spec`` monitors.
"""

from tmm.coordinate_check import CoordinateCheck, coord_check
from tmm.explain import Explanation
from tmm.gaps import MonitoringWarning
from tmm.instrument import explain, instrument, monitor, remove
from tmm.metrics import HISTOGRAM_EDGES, METRIC_NAMES
from tmm.monitor import Monitor
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
from tmm.spec import Spec

__all__ = [
    "HISTOGRAM_EDGES",
    "METRIC_NAMES",
    "CoordinateCheck",
    "Explanation",
    "Monitor",
    "MonitoringWarning",
    "Rule",
    "Run",
    "Spec",
    "activation",
    "activation_difference",
    "activation_gradient",
    "attention",
    "coord_check",
    "explain",
    "gradient",
    "instrument",
    "monitor",
    "open_run",
    "optimizer_state",
    "parameter",
    "parameter_difference",
    "rcc",
    "record",
    "remove",
    "update",
]
