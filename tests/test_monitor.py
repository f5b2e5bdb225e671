"""The lifecycle of steps, against a plain Python model of it."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import tmm
from tmm.core.failures import MonitoringWarning
from tmm.instrumentation.twin import Twin


class Scale(nn.Module):
    """Gives back twice its input; fails on demand."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.scale.weight, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.scale(x)
        return output


SPEC = tmm.Spec(
    tmm.activation("mean", "norm", "max"),
    tmm.activation(spread=lambda x: x - x.mean(), aggregate=lambda v: v.abs().sum()),
    tmm.activation(low=lambda x: x.min(), aggregate="min"),
    exclude=r"\[root",
    every=2,
)


def instrumented(
    run: Path | None = None, spec: tmm.Spec = SPEC, **options: object
) -> tuple[nn.Module, tmm.Monitor]:
    torch._dynamo.reset()
    model = torch.compile(Scale(), backend="eager", dynamic=True)
    model = tmm.instrument(model, spec, run, **options)  # type: ignore[arg-type]
    return model, tmm.monitor(model)


def batch(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1)


class Lifecycle(RuleBasedStateMachine):
    """Any order of calls; the model keeps the outputs that belong to the open step."""

    @initialize()
    def start(self) -> None:
        self.model, self.monitor = instrumented()
        self.step = 0
        self.open: list[list[float]] | None = None
        self.logged: list[float] = []
        self.last: dict[str, float] = {}
        self.history: dict[int, dict[str, float]] = {}

    @property
    def monitored(self) -> bool:
        return self.open is not None and self.step % 2 == 0

    @rule(ahead=st.integers(0, 2))
    def begin(self, ahead: int) -> None:
        self.step += ahead  # an open step is dropped, a recorded one replaced
        assert self.monitor.begin_step(self.step) == (self.step % 2 == 0)
        self.open, self.logged, self.last = [], [], {}

    @rule(values=st.lists(st.integers(-9, 9), min_size=1, max_size=4))
    def forward(self, values: list[int]) -> None:
        assert self.model(batch(*values)).flatten().tolist() == [2 * v for v in values]
        if self.monitored:
            assert self.open is not None
            self.open.append([2.0 * v for v in values])

    @rule()
    def evaluate(self) -> None:
        with self.monitor.no_monitor():
            assert not self.monitor.is_monitoring()
            self.model(batch(100.0))

    @rule(value=st.integers(-9, 9))
    def log(self, value: int) -> None:
        self.monitor.log_scalar("loss", value)
        if self.monitored:
            self.logged.append(float(value))

    @rule()
    def fail(self) -> None:
        with pytest.raises(RuntimeError):
            self.model(torch.ones(1, 3))

    @precondition(lambda self: self.open is not None)
    @rule()
    def next_micro_batch(self) -> None:
        self.monitor.after_micro_batch()

    @precondition(lambda self: self.open is not None)
    @rule()
    def end(self) -> None:
        self.monitor.end_step()
        if self.monitored:
            self.last = self.expected()
            self.history[self.step] = self.last
        self.open = None

    @precondition(lambda self: self.open is None)
    @rule()
    def end_without_begin(self) -> None:
        with pytest.raises(RuntimeError, match="no step is open"):
            self.monitor.end_step()

    @rule()
    def interrupted(self) -> None:
        with pytest.raises(KeyError), self.monitor.step(self.step):
            self.model(batch(1.0))
            raise KeyError
        self.open, self.last = None, {}

    @rule()
    def back_in_time(self) -> None:
        if self.monitor.current_step is not None:
            with pytest.raises(ValueError, match="must not decrease"):
                self.monitor.begin_step(self.monitor.current_step - 1)

    def expected(self) -> dict[str, float]:
        values: dict[str, float] = {}
        assert self.open is not None
        if joined := [value for part in self.open for value in part]:
            spread = [v - statistics.mean(part) for part in self.open for v in part]
            values = {
                "activation/scale/mean": statistics.mean(joined),
                "activation/scale/norm": float(np.linalg.norm(joined)),
                "activation/scale/max": max(joined),
                "activation/scale/low": min(joined),
                "activation/scale/spread": sum(map(abs, spread)),
            }
        if self.logged:
            values["loss"] = statistics.mean(self.logged)
        return values

    @invariant()
    def agrees(self) -> None:
        assert self.monitor.is_monitoring() == self.monitored
        assert self.monitor.get_step_metrics() == pytest.approx(self.last, rel=1e-6, abs=1e-6)
        metrics = self.monitor.get_all_metrics()
        assert metrics.keys() == self.history.keys()
        for step, values in self.history.items():
            assert metrics[step] == pytest.approx(values, rel=1e-6, abs=1e-6)


class TestLifecycle(Lifecycle.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_a_run_holds_what_the_monitor_gave(tmp_path: Path) -> None:
    model, monitor = instrumented(tmp_path / "run")
    given = {}
    for step in range(5):
        with monitor.step(step):
            model(batch(step, 1.0))
            monitor.log_scalars({"loss": 1.0 / (step + 1), "rate": torch.tensor(0.5)})
        if step % 2 == 0:
            given[step] = monitor.get_step_metrics()
    assert monitor.get_all_metrics() == given
    tmm.remove(model)
    with tmm.open_run(tmp_path / "run") as run:
        assert run.steps.tolist() == [0, 2, 4]
        assert {step: run.at(step) for step in (0, 2, 4)} == given
        assert run.series("loss")[1].tolist() == [1.0, 1 / 3, 1 / 5]
        info = run.key_info("activation/scale/low")
        assert (info.kind, info.site, info.aggregate) == ("activation", "scale", "min")
        assert "tmm.activation('mean', 'norm', 'max'): 1 of 2 modules" in run.text("explain.txt")
        assert "graph 0, of [root module]: 3 rows, extra outputs: 2 (" in run.text("explain.txt")


def test_a_dropped_step_leaves_an_event(tmp_path: Path) -> None:
    model, monitor = instrumented(tmp_path / "run")
    with pytest.raises(KeyError), monitor.step(0):
        model(batch(1.0))
        raise KeyError("data")
    with monitor.step(2):
        model(batch(1.0))
    monitor.begin_step(4)
    tmm.remove(model)
    with tmm.open_run(tmp_path / "run") as run:
        assert run.steps.tolist() == [2]
        assert [(event.step, event.kind) for event in run.events] == [(0, "gap"), (4, "gap")]
        assert "KeyError: 'data'" in run.events[0].text
        assert "was not ended" in run.events[1].text


def test_a_failing_aggregate_is_named() -> None:
    def fail(values: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("no")

    spec = tmm.Spec(tmm.activation(mine=lambda x: x, aggregate=fail))
    model, monitor = instrumented(spec=spec)
    message = r"aggregate of 'activation/.*/mine'.*failed.*no"
    with pytest.raises(ValueError, match=message), monitor.step(0):
        model(batch(1.0))
    assert not monitor.is_monitoring()


@pytest.mark.parametrize("step", ["1", 1.0, True, None])
def test_steps_are_integers(step: object) -> None:
    _, monitor = instrumented()
    with pytest.raises(TypeError, match="is not an integer"):
        monitor.begin_step(step)  # type: ignore[arg-type]
    monitor.begin_step(np.int64(2))
    assert monitor.current_step == 2


def test_log_scalar_takes_one_number() -> None:
    _, monitor = instrumented()
    monitor.log_scalar("outside", 1.0)
    with monitor.step(0):
        with pytest.raises(ValueError, match="log_tensor"):
            monitor.log_scalar("loss", torch.ones(2))
        monitor.log_tensor("values", torch.tensor([1, 2, 6]))
        monitor.log_tensor("values", torch.tensor([3.0]), aggregate="mean")
        monitor.log_tensor("top", torch.tensor([1.0, 7.0]), aggregate="max")
    assert monitor.get_step_metrics() == {"values": 3.0, "top": 7.0}
    with monitor.step(1):
        monitor.log_scalar("silent", 1.0)
        monitor.log_scalar("forced", 2.0, force=True)
    assert monitor.get_step_metrics() == {"forced": 2.0}


@pytest.mark.parametrize(
    ("log", "error", "message"),
    [
        (lambda m: m.log_scalar("loss", "high"), TypeError, "'loss'.*'high' is not a number"),
        (lambda m: m.log_scalar("loss", None), TypeError, "'loss'.*None is not a number"),
        (lambda m: m.log_scalar(3, 1.0), ValueError, "the key 3 is not text"),
        (lambda m: m.log_scalar("", 1.0), ValueError, "the key '' is not text"),
        (lambda m: m.log_scalar("loss", 1.0, "median"), ValueError, "aggregate='median'"),
        (lambda m: m.log_scalars([("loss", 1.0)]), TypeError, "give a dictionary"),
        (lambda m: m.log_tensor("x", [1.0]), TypeError, "'x'.*not a tensor"),
        (lambda m: m.log_scalar("x", 10**400), ValueError, "'x'.*too large"),
        (lambda m: m.log_scalar("x", torch.tensor(3 + 4j)), ValueError, "'x'.*complex.*abs"),
        (lambda m: m.log_tensor("x", torch.ones(2) * 1j), ValueError, "'x'.*complex.*abs"),
        (lambda m: m.log_scalar("x", torch.ones((), device="meta")), ValueError, "'x'.*meta"),
        (lambda m: m.begin_step(2**63), ValueError, "does not fit in 64 bits"),
    ],
)
def test_what_cannot_be_logged_is_named(
    log: Callable[[Any], object], error: type[Exception], message: str
) -> None:
    _, monitor = instrumented()
    with pytest.raises(error, match=message):
        log(monitor)


@pytest.mark.parametrize("made", ["jagged", "with holes", "strided", "empty"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_elements_of_nested_tensors_are_logged(made: str) -> None:
    """And none of what lies between them."""
    rows = [torch.tensor([1.0, 2.0]), torch.tensor([3.0])]
    if made == "with holes":
        values, offsets = torch.tensor([1.0, 2.0, 9.0, 3.0]), torch.tensor([0, 3, 4])
        nested = torch.nested.nested_tensor_from_jagged(
            values[:, None], offsets, lengths=torch.tensor([2, 1])
        )
    else:
        layout = torch.jagged if made == "jagged" else torch.strided
        nested = torch.nested.nested_tensor([] if made == "empty" else rows, layout=layout)
    model = tmm.instrument(nn.Linear(1, 1), tmm.Spec(tmm.activation("rms")))
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(torch.ones(1))
        monitor.log_tensor("lengths", nested, "sum")
        monitor.log_tensor("lengths", torch.tensor([10.0]), "sum")
    assert monitor.get_step_metrics()["lengths"] == (10.0 if made == "empty" else 16.0)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_tensors_count_as_dense_ones(layout: torch.layout) -> None:
    _, monitor = instrumented()
    gradient = torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    with monitor.step(0):
        monitor.log_tensor("gradient", gradient.to_sparse(layout=layout))
        monitor.log_scalar("one", torch.ones(1).to_sparse())
    assert monitor.get_step_metrics() == {"gradient": 1.0, "one": 1.0}


class Fault:
    """Stands in for a twin that breaks."""

    def __init__(self, twin: Twin) -> None:
        self.intact, self.broken, self.calls = twin.run, True, 0

    def run(self, *args: object) -> object:
        self.calls += 1
        torch.rand(3)  # a forward pass that fails midway has drawn random numbers
        if self.broken:
            raise MemoryError("no room")
        return self.intact(*args)  # type: ignore[arg-type]


def broken(monitor: tmm.Monitor) -> Fault:
    assert monitor._steps.twin is not None
    fault = Fault(monitor._steps.twin)
    monitor._steps.twin.run = fault.run  # type: ignore[method-assign]
    return fault


def test_a_fault_before_the_first_step_is_raised() -> None:
    model, monitor = instrumented()
    broken(monitor)
    with pytest.raises(MemoryError), monitor.step(0):
        model(batch(1.0))


def test_a_later_fault_does_not_end_the_training(tmp_path: Path) -> None:
    model, monitor = instrumented(tmp_path / "run")
    with monitor.step(0):
        model(batch(1.0))
    fault = broken(monitor)
    before = torch.get_rng_state()
    with pytest.warns(MonitoringWarning, match="step 2.*no room"), monitor.step(2):
        assert model(batch(1.0)).item() == 2
        assert torch.equal(torch.get_rng_state(), before)
        model(batch(1.0))
    assert monitor.get_step_metrics() == {}
    fault.broken = False
    with monitor.step(4):
        model(batch(1.0))
    tmm.remove(model)
    with tmm.open_run(tmp_path / "run") as run:
        assert run.steps.tolist() == [0, 4]
        assert [(e.step, e.kind) for e in run.events] == [(2, "gap")]
        assert "MemoryError: no room" in run.events[0].text


def test_faults_in_a_row_are_not_tried_for_ever() -> None:
    model, monitor = instrumented(on_error="warn")
    fault = broken(monitor)
    with pytest.warns(MonitoringWarning) as warned:
        for step in range(0, 20, 2):
            with monitor.step(step):
                model(batch(1.0))
    assert len(warned) == 1
    assert fault.calls == 3


def test_an_error_of_the_model_is_its_own() -> None:
    model, monitor = instrumented(on_error="warn")
    with pytest.raises(RuntimeError, match="mat1 and mat2|size"), monitor.step(0):
        model(torch.ones(1, 3))
    with monitor.step(2):
        model(batch(1.0))
    assert monitor.get_step_metrics()


def test_prepare_compiles_ahead() -> None:
    model, monitor = instrumented()
    state = torch.get_rng_state()
    monitor.prepare(batch(1.0, 2.0))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(tmm.explain(model).graphs) == 1
    with monitor.step(0):
        with pytest.raises(RuntimeError, match="before begin_step"):
            monitor.prepare(batch(1.0))
        model(batch(1.0, 2.0))
    assert len(tmm.explain(model).graphs) == 1
    assert monitor.get_step_metrics()["activation/scale/max"] == 4


@pytest.mark.parametrize("when", ["before any step", "between steps", "after the last one"])
@pytest.mark.parametrize("kind", ["scalar", "scalars", "tensor"])
def test_what_is_logged_while_no_step_is_open_is_told_once(kind: str, when: str) -> None:
    monitor = tmm.monitor(tmm.instrument(nn.Linear(2, 2), tmm.Spec(tmm.activation("rms"), every=2)))

    def log() -> None:
        if kind == "scalars":
            monitor.log_scalars({"loss": 1.0})
        else:
            value = torch.ones(3) if kind == "tensor" else 1.0
            getattr(monitor, f"log_{kind}")("loss", value)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MonitoringWarning)
        for step in range(3):
            if when == "before any step" or (when == "between steps" and step):
                log()
            with monitor.step(step):
                monitor.module(torch.ones(1, 2))
                log()  # also in one that is not monitored, as the spec says
        if when == "after the last one":
            log()
            log()
    texts = [str(w.message) for w in caught if w.category is MonitoringWarning]
    (text,) = [text for text in texts if "while no step was open" in text]
    name = "log_tensor" if kind == "tensor" else "log_scalar"
    assert text.count(f"{name}('loss')") == 1
    assert "with monitor.step(n)" in text
