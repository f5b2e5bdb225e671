"""Steps of optimizers that are missing, or not all that changes the parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import SGD

import tmm
from tests.model_zoo import noise
from tmm.core.failures import MonitoringWarning

VECTORS = noise(6, 4)
RULES = (tmm.gradient("norm"), tmm.update("norm"), tmm.activation("rms"))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def told(run: Callable[[], object]) -> list[str]:
    """What the monitoring warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    found = [item for item in caught if item.category is MonitoringWarning]
    assert {item.filename for item in found} <= {__file__}  # where the step ends
    return [str(item.message) for item in found]


def train(monitor: tmm.Monitor, model: Any, *steps: Callable[[], object]) -> Callable[[], None]:
    """A step of the monitor for each, with what is done in it after the backward pass."""

    def run() -> None:
        for index, step in enumerate(steps):
            with monitor.step(index):
                model.zero_grad()
                model(VECTORS).square().mean().backward()
                step()

    return run


def nothing() -> None:
    """Nothing happens after the backward pass."""


def test_steps_without_a_step_of_an_optimizer_are_named_once() -> None:
    model = tmm.instrument(network(), tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    (text,) = told(train(monitor, model, optimizer.step, nothing, nothing, optimizer.step))
    assert "no watched optimizer stepped in step 1" in text
    assert "rules of gradient, update have no rows" in text
    reason = "no watched optimizer stepped in step 1"
    assert tmm.explain(model).unmeasured == {"gradient, update": reason}
    assert "gradient/0.weight/norm" in monitor.get_step_metrics()


def test_an_optimizer_that_nobody_watches() -> None:
    model = tmm.instrument(network(), tmm.Spec(*RULES, tmm.parameter("rms")))
    monitor = tmm.monitor(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    (text,) = told(train(monitor, model, optimizer.step, optimizer.step))
    assert "rules of gradient, update, parameter have no rows" in text
    assert "Call monitor.watch(optimizer)" in text


def test_one_of_two_optimizers_is_watched() -> None:
    module = network()
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    first, second = (SGD(module[place].parameters(), lr=0.1) for place in (0, 2))
    monitor.watch(first)

    def both() -> None:
        first.step()
        second.step()

    (text,) = told(train(monitor, model, both, both))
    assert "an optimizer that is not watched stepped in step 0" in text
    assert tmm.explain(model).unmeasured == {
        f"gradient and update of 2.{name}": "its optimizer is not watched"
        for name in ("weight", "bias")
    }


@pytest.mark.parametrize("way", ["explicit", "skipped", "no rule", "not monitored", "no forward"])
def test_what_is_no_gap(way: str) -> None:
    rules = RULES[:1] if way == "explicit" else RULES[2:] if way == "no rule" else RULES
    every: Any = (lambda step: False) if way == "not monitored" else 1
    model = tmm.instrument(network(), tmm.Spec(*rules, every=every))
    monitor = tmm.monitor(model)
    optimizer = SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    step: Callable[[], object] = nothing
    if way == "explicit":
        step = monitor.monitor_gradients
    if way == "skipped":
        monitor.watch(optimizer, scaler)

        def step() -> None:
            scaler.scale(torch.ones(()))
            model[0].weight.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()

    def only_parameters() -> None:
        with monitor.step(0), monitor.no_monitor():
            pass  # which says that none is expected

    run = only_parameters if way == "no forward" else train(monitor, model, step)
    assert told(run) == []
    assert not tmm.explain(model).unmeasured


@pytest.mark.parametrize(
    "way", ["cleared", "cleared, to zero", "detached", "one of two", "closure"]
)
def test_steps_that_find_no_gradient_are_told_once(way: str) -> None:
    """Gradients that are zero are some, and one optimizer of several may have none."""
    module = network()
    model = tmm.instrument(torch.compile(module, backend="aot_eager"), tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    optimizers = [SGD(module[place].parameters(), lr=0.1) for place in (0, 2)]
    for optimizer in optimizers:
        monitor.watch(optimizer)

    def evaluate() -> float:
        module.zero_grad()
        loss = model(VECTORS).square().mean()
        loss.backward()
        return float(loss)

    def step() -> None:
        if way in ("cleared", "closure"):
            module.zero_grad()
        if way == "cleared, to zero":
            module.zero_grad(set_to_none=False)
        if way == "detached":
            for parameter in module.parameters():
                parameter.grad = None
        if way == "one of two":
            module[0].zero_grad()
        for optimizer in optimizers:
            optimizer.step(evaluate if way == "closure" else None)

    found = told(train(monitor, model, step, step))
    assert len(found) == (way in ("cleared", "detached"))
    for text in found:
        assert "optimizer.step() found no gradient in step 0" in text
        assert "rules of gradient, update have no rows" in text
        assert "not between backward() and optimizer.step()" in text


def interpolated(module: nn.Module, slow: list[Tensor]) -> None:
    with torch.no_grad():
        for p, old in zip(module.parameters(), slow, strict=True):
            p.lerp_(old, 0.5)


def through_data(module: nn.Module, slow: list[Tensor]) -> None:
    for p, old in zip(module.parameters(), slow, strict=True):
        p.data = 0.5 * (p.data + old)


def in_place_of_data(module: nn.Module, slow: list[Tensor]) -> None:
    for p in module.parameters():
        p.data.clamp_(-0.01, 0.01)


WRITES = {write.__name__: write for write in (interpolated, through_data, in_place_of_data)}


@pytest.mark.parametrize("way", WRITES)
def test_what_writes_to_parameters_after_the_step_is_told(way: str) -> None:
    """The update is what the optimizer did, which the notes say."""
    module = network()
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    optimizer = SGD(module.parameters(), lr=0.1)
    monitor.watch(optimizer)
    slow = [p.detach().clone() for p in module.parameters()]
    norms = []

    def step(writes: bool) -> None:
        optimizer.step()
        norms.append(0.1 * module[0].weight.grad.norm().item())
        if writes:
            WRITES[way](module, slow)

    steps = [lambda writes=writes: step(writes) for writes in (False, True, True)]
    (text,) = told(train(monitor, model, *steps))
    assert "something wrote to parameters after the step of their optimizer" in text
    assert "in step 1" in text
    assert tmm.explain(model).notes == {"update": text}
    assert f"update: {text}" in str(tmm.explain(model))
    for index, norm in enumerate(norms):
        found = monitor.get_all_metrics()[index]["update/0.weight/norm"]
        assert found == pytest.approx(norm, rel=1e-4)


def test_what_does_not_write_to_parameters() -> None:
    """Averages of weights, weight norm, a second optimizer and NaN are no such writes."""
    module = network()
    parametrize.register_parametrization(module[2], "weight", nn.Tanh(), unsafe=True)  # type: ignore[index]
    model = tmm.instrument(module, tmm.Spec(*RULES))
    monitor = tmm.monitor(model)
    first, second = (SGD(module[place].parameters(), lr=0.1) for place in (0, 2))  # type: ignore[index]
    for optimizer in (first, second):
        monitor.watch(optimizer)
    average = torch.optim.swa_utils.AveragedModel(module)

    def step() -> None:
        first.step()
        second.step()
        first.step()
        average.update_parameters(module)
        model(VECTORS)

    def fails() -> None:
        for p in module.parameters():
            assert p.grad is not None
            p.grad.fill_(torch.nan)
        step()

    assert told(train(monitor, model, step, step, fails)) == []
    assert not tmm.explain(model).notes
