"""Metric functions that read numbers from outside, which may change while a model trains."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tmm.core.outside_values import differing, outside_values

Setter = Callable[[float], None]
Function = Callable[[torch.Tensor], torch.Tensor]

threshold = 0.0


def ones(x: torch.Tensor) -> torch.Tensor:
    return (x * 0 + 1).mean()


class Settings:
    factor = 0.0


@dataclass
class Slotted:
    __slots__ = ("factor",)
    factor: float


class Metric:
    def __init__(self) -> None:
        self.factor = 0.0

    def method(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        return ones(x) * self.factor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return ones(x) * self.doubled / 2

    @property
    def doubled(self) -> float:
        return self.factor * 2


def of_global() -> tuple[Function, Setter]:
    def change(value: float) -> None:
        global threshold
        threshold = value

    return lambda x: ones(x) * threshold, change


def of_closure() -> tuple[Function, Setter]:
    factor = 0.0

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return lambda x: ones(x) * factor, change


def of_list() -> tuple[Function, Setter]:
    kept = [0.0]
    return lambda x: ones(x) * kept[0], partial(kept.__setitem__, 0)


def of_dict() -> tuple[Function, Setter]:
    kept = {"metrics": {"factor": 0.0}}
    return lambda x: ones(x) * kept["metrics"]["factor"], partial(
        kept["metrics"].__setitem__, "factor"
    )


def of_class() -> tuple[Function, Setter]:
    return lambda x: ones(x) * Settings.factor, partial(setattr, Settings, "factor")


def of_instance() -> tuple[Function, Setter]:
    settings = SimpleNamespace(own=Slotted(0.0))
    return lambda x: ones(x) * settings.own.factor, partial(setattr, settings.own, "factor")


def of_bound_method() -> tuple[Function, Setter]:
    metric = Metric()
    return metric.method, partial(setattr, metric, "factor")


def of_callable_object() -> tuple[Function, Setter]:
    metric = Metric()
    return metric, partial(setattr, metric, "factor")


def of_partial() -> tuple[Function, Setter]:
    kept = [0.0]
    return partial(lambda values, x: ones(x) * values[0], kept), partial(kept.__setitem__, 0)


def of_helper() -> tuple[Function, Setter]:
    inner, change = of_closure()
    return lambda x: inner(x) + 0, change


def of_default() -> tuple[Function, Setter]:
    def function(x: torch.Tensor, kept: list[float] = [0.0]) -> torch.Tensor:  # noqa: B006
        return ones(x) * kept[0]

    (kept,) = function.__defaults__ or ()
    return function, partial(kept.__setitem__, 0)


KINDS = (
    *(of_global, of_closure, of_list, of_dict, of_class, of_instance, of_bound_method),
    *(of_callable_object, of_partial, of_helper, of_default),
)


@pytest.mark.parametrize("kind", KINDS)
def test_values_from_outside_are_found(kind: Callable[[], tuple[Function, Setter]]) -> None:
    function, change = kind()
    change(1.0)
    before = outside_values(function)
    assert 1.0 in before.values()
    assert differing(before, outside_values(function)) == []
    change(2.0)
    (name,) = differing(before, outside_values(function))
    assert outside_values(function)[name] == 2.0


def test_what_is_of_libraries_is_left_alone() -> None:
    assert outside_values(lambda x: torch.nn.functional.relu(x).mean()) == {}
    assert outside_values(torch.linalg.vector_norm) == {}
    assert outside_values(nn.Softmax(-1)) == {}
    nan = math.nan
    values = outside_values(lambda x: x * nan)
    assert differing(values, values) == []
    assert differing(values, {"nan": float("nan")}) == []
    assert differing({"a": 1}, {"a": True}) == ["a"]


RULES = (tmm.activation, tmm.activation_gradient, tmm.activation_difference)


def values_of_steps(
    rule: Any, function: Any, change: Setter, *, early: bool = False, compiled: Any
) -> list[float]:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    reference = "init" if rule is tmm.activation_difference else None
    spec = tmm.Spec(rule(own=function, modules="0$"), reference=reference)
    model = tmm.instrument(compiled(net), spec)
    monitor = tmm.monitor(model)
    found: list[float] = []
    for step in range(4):
        if early:
            change(step)
        with monitor.step(step):
            if not early:
                change(step)
            model(torch.randn(5, 3)).sum().backward()
        (value,) = (v for k, v in monitor.get_step_metrics().items() if k.endswith("/own"))
        found.append(float(value))
    tmm.remove(model)
    return found


def whole(net: nn.Module) -> Any:
    return torch.compile(net, backend="aot_eager")


def in_parts(net: nn.Module) -> Any:
    for part in net.children():
        part.compile(backend="eager")
    return net


def uncompiled(net: nn.Module) -> Any:
    return net


@pytest.mark.parametrize("compiled", [whole, in_parts, uncompiled])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [of_global, of_list, of_bound_method])
def test_each_step_has_the_value_of_its_time(kind: Any, rule: Any, compiled: Any) -> None:
    function, change = kind()

    def of_pair(own: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return function(own) + reference.sum() * 0

    given = of_pair if rule is tmm.activation_difference else function
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = values_of_steps(rule, given, change, early=kind is of_list, compiled=compiled)
    assert found == [0, 1, 2, 3]
    told = [str(w.message) for w in caught if "compiled anew" in str(w.message)]
    traces = compiled is whole or (compiled is in_parts and rule is tmm.activation_difference)
    assert len(told) <= 1
    if traces:
        assert "the metric 'own' reads what has changed: " in told[0]
        assert "from 0 to 1" in told[0]


def test_a_change_between_forward_and_backward_passes_loses_nothing() -> None:
    function, change = of_closure()
    net = nn.Linear(3, 4)
    spec = tmm.Spec(tmm.activation_gradient("norm", own=function), tmm.activation(own=function))
    model = tmm.instrument(torch.compile(net, backend="aot_eager"), spec)
    monitor = tmm.monitor(model)
    with pytest.warns(tmm.MonitoringWarning, match="reads what has changed"):
        for step in range(3):
            with monitor.step(step):
                change(1.0)
                first = model(torch.randn(5, 3)).sum()
                change(3.0)
                second = model(torch.randn(5, 3)).sum()
                first.backward()
                second.backward()
            values = monitor.get_step_metrics()
            assert values["activation/[root module]/own"] == 2
            assert values["activation_gradient/[root module]/own"] == 2
            assert values["activation_gradient/[root module]/norm"] == pytest.approx(40**0.5)


def test_functions_that_change_nothing_outside_are_traced_once() -> None:
    traced: list[torch.Size] = []
    constant = 3

    def counts(x: torch.Tensor) -> torch.Tensor:
        traced.append(x.shape)
        return x.mean() * constant

    def never(value: float) -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("error", tmm.MonitoringWarning)
        values_of_steps(tmm.activation, counts, never, compiled=whole)
    assert len(traced) <= 2  # once per trace of the only graph, whose shapes are fixed
