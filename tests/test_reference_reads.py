"""Where values leave tensors, the reference is right, or has no rows and a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests.eager_pair import Base, Pair, X, changed, model_of
from tmm.core.failures import MonitoringWarning

BOTH = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "not compiled"])
# What reads values decides between graphs, whatever compiles these.
BACKENDS = pytest.mark.parametrize(
    "backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow), None]
)
NAMES = {"a", "b", "[root module]"}


def pair_of(module: nn.Module, backend: str | None, *, change: bool = True) -> Pair:
    options = {} if backend is None else {"backend": backend}
    return Pair.of(module, compiled=backend is not None, change=change, **options)


def item(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.b(self.a(x) * self.scale.item())


def number(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.b(self.a(x) + float(self.a(x).sum()))


def listed(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.b(self.a(x) + self.a(x).sum().tolist())


@torch.compiler.disable
def by_numpy(y: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(y.detach().numpy() * 2)


def through_numpy(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    return self.b(y + by_numpy(y))


def branch(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    return self.b(y * 2 if y.sum() > self.sum_at_start + 1 else y)


def masked(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    return self.b(y[y.sum(-1) > self.sum_at_start / 6])


def counted(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    return self.b(y / (y > 1).nonzero().shape[0])


def from_a_buffer(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    self.mean = self.mean + y.detach().mean(0)
    return self.b(y * (1 + int(self.mean.abs().sum() * 1000)))


@BACKENDS
@pytest.mark.parametrize(
    "forward", [item, number, listed, through_numpy, branch, masked, counted, from_a_buffer]
)
def test_what_follows_a_value_that_is_another_one_has_no_rows(
    forward: Callable[..., Any], backend: str | None
) -> None:
    module = model_of(forward)
    with torch.no_grad():
        module.sum_at_start = float(module.a(X).sum())
    pair = pair_of(module, backend, change=False)
    got, _ = pair.step(0)
    assert got == dict.fromkeys(NAMES, 0.0)  # the values are the same, so is all that follows
    changed(module)
    if forward is branch:
        with torch.no_grad():
            module.a.bias += (module.sum_at_start + 2 - module.a(X).sum()).relu() / X.shape[0]
    with pytest.warns(MonitoringWarning, match="cannot be compared with the reference"):
        got, want = pair.step(1)
    # Where the layer was called before and after, its row would be that of a part of its calls.
    assert got == pytest.approx({name: want[name] for name in got}, rel=1e-9)
    assert got.keys() <= {"a"}
    assert pair.reasons.keys() >= {"b", "[root module]"}
    assert all("reference" in reason for reason in pair.reasons.values())


@BACKENDS
def test_values_of_what_both_share_cost_nothing(backend: str | None) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x) * x.sum().item()
        if bool((y.abs() < 1e6).all()):
            y = y + len(x[x > 0].tolist()) + by_numpy(x)
        return self.b(y)

    pair = pair_of(model_of(forward), backend)
    got, want = pair.step(0)
    assert got == pytest.approx(want, rel=1e-9)
    assert not pair.reasons


@BACKENDS
def test_numbers_that_a_model_keeps(backend: str | None) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.a(x) * self.factor)
        self.factor = self.scale.item()
        return y

    module = model_of(forward)
    module.factor = 1.0
    pair = pair_of(module, backend)
    with pytest.warns(MonitoringWarning):
        got, want = pair.step(0)
    assert got == pytest.approx({name: want[name] for name in got}, rel=1e-9)
    assert {"a", "b"} <= got.keys()
    got, _ = pair.step(1)
    assert not got
    assert pair.reasons["b"] == "factor may hold a number that was read from tensors"


@BOTH
@pytest.mark.parametrize("place", ["inside", "leaves", "cond"])
def test_values_that_a_graph_holds(place: str, compiled: bool) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if place == "cond":
            y = torch.cond(y.sum() > 0, lambda y: 2 * y, lambda y: 3 * y, (y,))
            return self.b(y)
        factor = self.scale.item()
        if place == "leaves":
            torch._dynamo.graph_break()
        return self.b(y * factor)

    pair = Pair.of(model_of(forward), compiled=compiled)
    with (
        torch._dynamo.config.patch(capture_scalar_outputs=True),
        pytest.warns(MonitoringWarning, match="cannot be compared with the reference"),
    ):
        got, want = pair.step(0)
    assert got == pytest.approx({"a": want["a"]}, rel=1e-9)
    assert pair.reasons.keys() >= {"b", "[root module]"}


def test_a_step_of_which_a_part_is_lost_has_no_row() -> None:
    """The row of the other micro-batches would look like that of the whole step."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        if self.reads:
            y = y * self.scale.item()
        return self.b(y)

    module = model_of(forward)
    pair = Pair.of(module, compiled=False)
    monitor = tmm.monitor(pair.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with monitor.step(0):
            for module.reads in (False, True):
                pair.model(X)
    got = monitor.get_step_metrics()
    assert "activation_difference/a/norm" in got
    assert not any(key.split("/")[1].startswith("b") for key in got), got
    module.reads = False
    with monitor.step(1):
        pair.model(X)
    assert "activation_difference/b/norm" in monitor.get_step_metrics()


class Routed(Base):
    """Each vector goes to one of three experts, as in Mixtral."""

    def __init__(self, *, skips: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.router, self.skips = nn.Linear(8, 3), skips

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(1, -1)
        mask = nn.functional.one_hot(chosen, 3).permute(2, 1, 0)
        result = torch.zeros_like(x)
        for index in range(3):
            place, token = torch.where(mask[index])
            if self.skips and token.shape[0] == 0:
                continue
            part = self.experts[index](x[token]) * weights[token, place, None]
            result.index_add_(0, token, part)
        return self.b(result)


@BOTH
@pytest.mark.parametrize("skips", [False, True])
def test_routing(skips: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    module = Routed(skips=skips).double()
    pair = Pair.of(module, compiled=compiled, change=False)
    with torch.no_grad():
        for parameter in pair.module.experts.parameters():
            parameter.mul_(1.5)
    got, want = pair.step(0)  # routed as before
    assert got == pytest.approx(want, rel=1e-9)
    with torch.no_grad():
        module.router.bias.copy_(torch.tensor([9.0, 0.0, -9.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, want = pair.step(1)
    assert {name: want[name] for name in got} == pytest.approx(got, rel=1e-9)
    assert got.keys() | pair.reasons.keys() >= {"router", "experts.0", "b", "[root module]"}
