"""Functions that torch.compile calls from the graph as they are, and torch's own logger of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import nn

from benchmarks.alternatives.hooks import Hook, into_buffer
from benchmarks.alternatives.interface import AOT_EAGER, Alternative, Attached, compile_alone
from benchmarks.five import five, has_output


def _leaf_hook(buffer: torch.Tensor, index: int) -> Hook:
    from torch._dynamo.decorators import leaf_function

    # One function per module: what it writes to is no argument, since torch would have to trace
    # that it is changed.
    @leaf_function
    def summarize(x: torch.Tensor) -> None:
        buffer[index] = five(x)

    @summarize.register_fake  # type: ignore[attr-defined]
    def fake(x: torch.Tensor) -> None:
        return None

    def measure(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        summarize(output)

    return measure


class _Values(logging.Handler):
    """Takes the numbers out of the lines that ``debug_grad_log`` logs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        number = record.getMessage().rsplit("=", 1)[1]
        self.found[f"gradient {len(self.found)}/norm"] = float(number)

    def read(self) -> Mapping[str, float]:
        values = dict(self.found)
        self.found.clear()
        return values


def debug_log(module: nn.Module, backend: str = "inductor") -> Attached:
    """``torch.utils.debug_log``: the norm of the gradient of each output, in lines of a log."""
    from torch.utils.debug_log import debug_grad_log

    def measure(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        debug_grad_log(output)

    for child in module.modules():
        if has_output(child):
            child.register_forward_hook(measure)
    logger, values = logging.getLogger("torch.utils.debug_log"), _Values()
    logger.addHandler(values)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return Attached(
        module,
        compile_alone(module, backend),
        values.read,
        values.found.clear,  # of others that log meanwhile
        close=lambda: logger.removeHandler(values),
    )


LEAF = "one call of Python per tensor from the graph, five calls of torch in it"
LOG = "one statistic: the norms of the gradients of all outputs, logged as text"
ALTERNATIVES = (
    Alternative("leaf functions", LEAF, partial(into_buffer, make=_leaf_hook)),
    Alternative(
        "leaf functions, aot_eager",
        LEAF,
        partial(into_buffer, make=_leaf_hook, backend="aot_eager"),
        AOT_EAGER,
    ),
    Alternative("torch.utils.debug_log", LOG, debug_log, same_work=False),
    Alternative(
        "torch.utils.debug_log, aot_eager",
        LOG,
        partial(debug_log, backend="aot_eager"),
        AOT_EAGER,
        same_work=False,
    ),
)
