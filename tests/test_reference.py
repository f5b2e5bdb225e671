"""Differences from a reference and the refined coordinate check, against eager forwards."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests.eager_hooks import Tolerance, assert_agrees, backward
from tests.eager_reference import Batch, expected
from tests.model_zoo import CASES, CORE

METRICS = ("norm", "rms", "relative_norm", "absmax", "cosine", "l2")
RULES = (tmm.activation_difference(*METRICS), tmm.rcc())
SINGLE = Tolerance(1e-5, 1e-5)
DOUBLE = Tolerance(1e-9, 1e-9)


def moved(module: nn.Module, amount: float = 0.3) -> nn.Module:
    """A copy with other parameters of about the same size."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            size = parameter.std() if parameter.numel() > 1 else parameter.abs().mean()
            change = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter += amount * (size + 0.05) * change
    return other


def run(model: Any, batches: Sequence[Batch], step: int = 0) -> dict[str, Any]:
    monitor = tmm.monitor(model)
    with monitor.step(step):
        for index, batch in enumerate(batches):
            torch.manual_seed(index)
            backward(model(**batch))
    return monitor.get_step_metrics()


def check(
    module: nn.Module,
    batches: Sequence[Batch],
    backend: str = "aot_eager",
    *,
    allowed: Tolerance = DOUBLE,
    floor: float = 1e-3,
    **options: Any,
) -> tmm.Explanation:
    reference = moved(module)
    want = expected(module, reference, batches, floor=floor)
    spec = tmm.Spec(*RULES, reference=reference)
    model = tmm.instrument(torch.compile(module, backend=backend, **options), spec)
    for step in range(2):
        assert_agrees(run(model, batches, step), want, allowed)
    return tmm.explain(model)


def as_double(batch: Batch) -> dict[str, Any]:
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in batch.items()
    }


@pytest.mark.parametrize("case", CORE, ids=lambda case: case.name)
def test_architectures_in_float64(case: Any) -> None:
    check(case.build().double(), [as_double(case.batch())])


@pytest.mark.parametrize("name", ["Sequential", "GPT2LMHeadModel", "ResNetForImageClassification"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_backends_in_float32(name: str, backend: str) -> None:
    module = CASES[name].build()
    if backend == "inductor":  # draws its own random numbers
        for child in module.modules():
            if isinstance(child, nn.Dropout):
                child.p = 0.0
    check(module, [CASES[name].batch()], backend, allowed=SINGLE, floor=0.1)
