"""An operator per tensor that the compiler does not look into, writing into a buffer."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.alternatives.hooks import Hook, into_buffer
from benchmarks.alternatives.interface import Alternative
from benchmarks.five import five


@torch.library.custom_op("tmm_benchmarks::summarize_into", mutates_args=("buffer",))
def summarize_into(x: torch.Tensor, buffer: torch.Tensor, index: int) -> None:
    """Write the five statistics of ``x`` into a row of ``buffer``."""
    buffer[index] = five(x)


@summarize_into.register_fake
def _(x: torch.Tensor, buffer: torch.Tensor, index: int) -> None:
    return None


def _hook(buffer: torch.Tensor, index: int) -> Hook:
    def measure(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        summarize_into(output.detach(), buffer, index)

    return measure


ALTERNATIVES = (
    Alternative(
        "custom operator",
        "one opaque call per tensor in the graph, five calls of torch in it",
        partial(into_buffer, make=_hook),
    ),
)
