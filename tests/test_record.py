"""Values that a model records by name, wherever its forward runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tmm

RMS = tmm.Spec(tmm.activation("rms"))


class Recording(nn.Module):
    """Records from the middle of a forward; ``pause`` may break the graph before."""

    def __init__(self, pause: Callable[[torch.Tensor], object] = torch.is_tensor) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.pause = pause

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.fc(x)
        self.pause(y)
        tmm.record("gate", y)
        tmm.record("gate/largest", y, aggregate="max")
        tmm.record("gate/middle", y, aggregate=lambda values: values.median())
        tmm.record("positive", (y > 0).sum(), "sum")
        y += 100  # what was recorded before is not changed by it
        return y


def break_graph(y: torch.Tensor) -> None:
    torch._dynamo.graph_break()


@torch.compiler.disable
def outside(y: torch.Tensor) -> None:
    tmm.record("outside", y, "min")


PAUSES = {"none": torch.is_tensor, "break": break_graph, "disabled": outside}
BACKENDS = (None, "eager", "aot_eager", "inductor")
# Each pause without a compiler and under two backends; under Inductor what lies in one graph.
SLOW = (("aot_eager", "break"), ("inductor", "break"), ("inductor", "disabled"))


@pytest.mark.parametrize(
    ("backend", "pause"),
    [
        pytest.param(backend, pause, marks=pytest.mark.slow if (backend, pause) in SLOW else ())
        for backend in BACKENDS
        for pause in PAUSES
    ],
)
def test_all_elements_of_a_step_are_joined(backend: str | None, pause: str) -> None:
    module = Recording(PAUSES[pause])
    model = module if backend is None else torch.compile(module, backend=backend)
    tmm.instrument(model, RMS)
    monitor = tmm.monitor(model)
    for step in range(3):
        batches = [torch.randn(3, 4), torch.randn(5, 4) * 2]
        values = torch.cat([module.fc(x).detach().reshape(-1) for x in batches]).double()
        model(batches[0])
        with monitor.step(step):
            for x in batches:
                model(x)
        want = {
            "gate": values.mean(),
            "gate/largest": values.max(),
            "gate/middle": values.median(),
            "positive": (values > 0).sum(),
        }
        if pause == "disabled":
            want["outside"] = values.min()
        got = {k: v for k, v in monitor.get_step_metrics().items() if "activation" not in k}
        assert got == pytest.approx({k: float(v) for k, v in want.items()}, rel=1e-5, abs=1e-6)
    assert set(tmm.explain(model).recorded) == set(want)


def test_the_plain_program_holds_no_trace_of_it() -> None:
    targets: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    model = tmm.instrument(torch.compile(Recording(), backend=backend), RMS)
    model(torch.randn(2, 4))
    assert targets
    assert not [t for t in targets if "tap" in str(t) or "record" in str(t)]
    assert tmm.monitor(model).get_step_metrics() == {}


def test_it_does_nothing_outside_of_a_monitored_model() -> None:
    tmm.record("anything", torch.ones(2))
    Recording()(torch.randn(2, 4))
    torch.compile(Recording(), backend="eager", fullgraph=True)(torch.randn(2, 4))


class Naming(nn.Module):
    def __init__(self, record: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.record = record

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.record(x)
        return x * 2


def twice(x: torch.Tensor) -> None:
    tmm.record("x", x)
    tmm.record("x", x, "max")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (lambda x: tmm.record("activation/x", x), "keys that start with 'activation' are tmm's"),
        (lambda x: tmm.record("attention_mass/x", x), "'attention_mass' are tmm's own"),
        (lambda x: tmm.record("RCC x_t/x", x), "'RCC' are tmm's own"),
        (lambda x: tmm.record("", x), "name='' is not a key"),
        (lambda x: tmm.record("x", x, "median"), "aggregate='median' is neither callable nor"),
        (lambda x: tmm.record("x", 3.0), "tensor is a float"),
        (twice, "'x'.*aggregate='max' and with aggregate='mean'"),
    ],
)
@pytest.mark.parametrize("compiled", [True, False])
def test_what_cannot_be_recorded(
    record: Callable[[torch.Tensor], None], message: str, compiled: bool
) -> None:
    module = Naming(record)
    model = torch.compile(module, backend="eager") if compiled else torch.compiler.disable(module)
    tmm.instrument(model, RMS)
    model(torch.ones(2))  # outside of a monitored step nothing is looked at
    with pytest.raises((ValueError, TypeError), match=message), tmm.monitor(model).step(0):
        model(torch.ones(2))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x.detach().to_sparse(), "sparse_coo output"),
        (lambda x: x.detach().to_sparse_csr(), "sparse_csr output"),
        (lambda x: torch.nested.nested_tensor([x[0], x[0, :1]]), "nested output"),
    ],
)
def test_what_cannot_be_read_is_named_and_ends_no_training(
    change: Callable[[torch.Tensor], torch.Tensor], reason: str
) -> None:
    module = Naming(lambda x: tmm.record("x", change(x)))
    model = tmm.instrument(module, RMS)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        assert torch.equal(model(torch.ones(2, 3)), torch.full((2, 3), 2.0))
    assert "x" not in monitor.get_step_metrics()
    assert "activation/[root module]/rms" in monitor.get_step_metrics()
    assert tmm.explain(model).unmeasured["x"] == reason


@pytest.mark.parametrize("aggregate", ["mean", torch.median])
def test_a_name_that_is_logged_as_well(aggregate: Any) -> None:
    module = Naming(lambda x: tmm.record("x", x, aggregate))
    model = tmm.instrument(torch.compile(module, backend="eager"), RMS)
    monitor = tmm.monitor(model)
    monitor.begin_step(0)
    model(torch.ones(2))
    monitor.log_scalar("x", 1.0)
    with pytest.raises(ValueError, match="'x' was recorded by the model and logged"):
        monitor.end_step()


def test_the_executing_model_receives_the_value() -> None:
    models = [torch.compile(Recording(), backend="eager") for _ in range(2)]
    monitors = [tmm.monitor(tmm.instrument(model, RMS)) for model in models]
    x = torch.randn(3, 4)
    with monitors[0].step(0), monitors[1].step(0):
        for model in models:
            model(x)
    for model, monitor in zip(models, monitors, strict=True):
        want = float(model._orig_mod.fc(x).mean())
        assert monitor.get_step_metrics()["gate"] == pytest.approx(want, rel=1e-5)
