"""Users' functions of parameters and gradients that compute what tmm knows."""

from __future__ import annotations

import inspect
import types

import torch

from tmm.core.metrics import KnownMetric, Reduction
from tmm.core.torch_private import FakeTensorMode
from tmm.passes.metrics.recognize import recognize
from tmm.passes.metrics.trace import MetricFunctionError, trace_function


class KnownFunctions:
    """Recognizes functions from a trace; remembers the answers for each shape and dtype.

    A function that may depend on more than its argument is not traced, for it is to run each time.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Reduction, torch.Size, torch.dtype], KnownMetric | None] = {}

    def find(self, reduction: Reduction, tensor: torch.Tensor) -> KnownMetric | None:
        """The metric that ``reduction.function`` computes of such a tensor, if it is known."""
        key = reduction, tensor.shape, tensor.dtype
        if key not in self._known:
            self._known[key] = _find(reduction, tensor)
        return self._known[key]


def _find(reduction: Reduction, tensor: torch.Tensor) -> KnownMetric | None:
    if not is_stateless(reduction.function) or tensor.layout is not torch.strided:
        return None
    with FakeTensorMode():
        example = torch.empty(tensor.shape, dtype=tensor.dtype)
    try:
        metric = recognize(trace_function(example, reduction).graph)
    except MetricFunctionError:
        return None
    return metric if metric is not None and metric.can_serve(reduction) else None


def is_stateless(function: object) -> bool:
    """Whether a function reads nothing but its arguments, modules and built-in functions."""
    if not isinstance(function, types.FunctionType) or function.__defaults__:
        return False
    variables = inspect.getclosurevars(function)
    names_only = all(isinstance(value, types.ModuleType) for value in variables.globals.values())
    return names_only and not variables.nonlocals
