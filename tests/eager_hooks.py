"""The oracle of ``tmm.testing``, and trainings of one step to compare with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tmm.testing.defined_values import (
    AVERAGES,
    BUILTIN,
    COUNTS,
    EDGES,
    EXTREMES,
    ORDERED,
    Expected,
    FloatArray,
    Tolerance,
    builtin_values,
    disagreements,
    histogram,
)
from tmm.testing.eager_hooks import MetricFunction, Recording, eager_hooks, site_names, walk

__all__ = [
    "AVERAGES",
    "BUILTIN",
    "COUNTS",
    "EDGES",
    "EXTREMES",
    "ORDERED",
    "Call",
    "Expected",
    "FloatArray",
    "MetricFunction",
    "Recording",
    "Tolerance",
    "assert_agrees",
    "backward",
    "builtin_values",
    "disagreements",
    "eager_hooks",
    "histogram",
    "record_calls",
    "run_calls",
    "site_names",
    "tolerance",
    "walk",
]


def tolerance(backend: str, dtype: torch.dtype = torch.float32) -> Tolerance:
    """What the project promises for a model that computes in ``dtype`` under ``backend``."""
    if backend == "inductor" and dtype == torch.bfloat16:
        return Tolerance(5e-3, 2e-2)
    if dtype == torch.float64:
        return Tolerance(1e-12, 1e-12)
    return Tolerance(1e-4, 1e-4) if backend == "inductor" else Tolerance(1e-5, 1e-5)


Call = Callable[[torch.nn.Module], object]


def run_calls(model: torch.nn.Module, calls: list[Call], *, seed: int = 0) -> None:
    """Micro-batches of one step: forward and backward of each, from the same random numbers."""
    for index, call in enumerate(calls):
        torch.manual_seed(seed + index)
        backward(call(model))


def record_calls(module: torch.nn.Module, calls: list[Call], *, seed: int = 0) -> Recording:
    """What hooks see in ``run_calls`` of an uncompiled module."""
    recording = Recording()
    with torch.compiler.set_stance("force_eager"):
        for index, call in enumerate(calls):
            torch.manual_seed(seed + index)
            with eager_hooks(module, recording):
                output = call(module)
            backward(output)
    return recording


def backward(output: object) -> None:
    """A backward pass from all that a model returned."""
    tensors = [tensor for _, tensor in walk(output) if tensor.requires_grad]
    if tensors:
        torch.stack([tensor.abs().double().sum() for tensor in tensors]).sum().backward()


def assert_agrees(
    got: Mapping[str, float | FloatArray],
    want: Mapping[str, Expected],
    allowed: Tolerance,
    *,
    shown: int = 12,
) -> None:
    """Fail with the keys at fault, unless each key is there and within its tolerance."""
    assert want, "nothing to compare with"
    lines = disagreements(got, want, allowed)
    assert not lines, f"{len(lines)} of {len(want)} keys disagree:\n" + "\n".join(lines[:shown])
