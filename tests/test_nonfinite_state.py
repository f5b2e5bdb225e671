"""Looking for a NaN leaves nothing behind."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tmm
from tests.nonfinite_models import (
    CASES,
    HOW,
    SPEC,
)
from tests.ways import Counting

# Nothing is left behind


class Stateful(nn.Module):
    """Dropout, batch norm, a counter among the buffers, hooks, and an overflow."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        with torch.no_grad():
            self.frozen.mul_(0.5)
        x.mul_(2)
        return (self.blocks(x) * torch.rand(8) * self.frozen).sum() / 0


def state(module: nn.Module) -> list[Any]:
    tensors = [*module.parameters(), *module.buffers()]
    grads = [p.grad for p in module.parameters()]
    return [
        *([t.detach().clone() for t in tensors], [t._version for t in tensors], grads),
        *([None if g is None else g.clone() for g in grads], [id(t) for t in tensors]),
        *(torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)),
        [m.training for m in module.modules()],
        [{**m.__dict__} for m in module.modules()],
        [list(m._forward_hooks.items()) for m in module.modules()],
    ]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(bits(first), bits(second))
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return list(first) == list(second) and all(map(same, first.values(), second.values()))
    if isinstance(first, np.ndarray):
        return bool((first == second).all())
    return bool(first == second)


@pytest.mark.parametrize(
    ("how", "fails"), [(how, False) for how in HOW] + [("not compiled", True), ("whole", True)]
)
def test_everything_is_as_it_was(how: str, fails: bool) -> None:
    module = Stateful()
    backend = Counting("aot_eager")
    model = HOW[how](module, backend)
    x = torch.randn(4, 8)
    stepped: list[str] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: stepped.append(name))
    model(x.clone()).backward()
    stepped.clear()
    before, x_before, compiled = state(module), x.clone(), backend.graphs
    if fails:
        with pytest.raises((RuntimeError, TypeError)):
            tmm.find_nonfinite(model, x[:, :5])
        with pytest.raises(ValueError, match="loss= returned 3"):
            tmm.find_nonfinite(model, x, lambda output: 3)  # type: ignore[arg-type,return-value]
    else:
        result = tmm.find_nonfinite(model, x)
        assert result is not None
    assert same(state(module), before)
    assert torch.equal(x, x_before)
    assert stepped == []
    assert backend.graphs == compiled
    if not fails:
        with torch.compiler.set_stance("fail_on_recompile"):
            model(x).backward()  # and the user's program is still compiled
        assert stepped


def test_a_pending_backward_pass_is_not_harmed() -> None:
    module, x = Stateful(), torch.randn(4, 8)
    expected = copy.deepcopy(module)
    torch.manual_seed(1)
    expected(x.clone()).backward()
    torch.manual_seed(1)
    loss = module(x.clone())
    assert tmm.find_nonfinite(module, x) is not None
    loss.backward()
    for (name, parameter), other in zip(
        module.named_parameters(), expected.parameters(), strict=True
    ):
        if parameter.grad is not None:
            assert torch.equal(parameter.grad.isnan(), other.grad.isnan()), name


def test_the_random_numbers_are_those_of_the_step() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.rand(3))
        return (x / seen[-1].round()).sum()

    seen: list[torch.Tensor] = []
    torch.manual_seed(5)
    result = tmm.find_nonfinite(step, torch.randn(3))
    assert torch.equal(seen[0], torch.rand(3))
    assert (result is None) == bool(seen[0].round().all())


def test_an_open_step_of_a_monitor_measures_nothing_of_it() -> None:
    module, x = CASES["log of zero"].build()
    model = tmm.instrument(torch.compile(module, backend="aot_eager"), SPEC)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(x)
    expected = monitor.get_step_metrics()
    with monitor.step(1):
        model(x)
        assert tmm.find_nonfinite(model, x) is not None
    assert expected
    assert monitor.get_step_metrics() == pytest.approx(expected, nan_ok=True)


def test_it_works_without_gradients_being_enabled() -> None:
    module, x = CASES["first in the backward"].build()
    with torch.no_grad():
        result = tmm.find_nonfinite(module, x)
    assert result is not None
    assert result.first.phase == "backward"
    assert tmm.find_nonfinite(module, x, backward=False) is None
