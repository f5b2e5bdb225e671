"""Users who forget something are told: once, at their line, in ``tmm.explain`` and the run."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

import tmm
from tests.interpreters import Interpreters
from tmm.core import failures as gaps
from tmm.core.failures import Gaps, MonitoringWarning, UserLine
from tmm.core.records import Event
from tmm.runs import reminder
from tmm.runs.instrument import steps_of
from tmm.steps.optimizer_hooks import Watch

X = torch.ones(4, 3)
RMS = tmm.Spec(tmm.activation("rms"))
PARAMETERS = tmm.Spec(tmm.gradient("norm"), tmm.parameter("rms"), tmm.update("norm"))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


class Told:
    """What tmm warned of in a block, and the lines that it named."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.lines: list[int] = []

    def __enter__(self) -> Told:
        self._catcher = warnings.catch_warnings(record=True)
        self._caught = self._catcher.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error: object) -> None:
        self._catcher.__exit__(None, None, None)
        found = [item for item in self._caught or () if item.category is MonitoringWarning]
        assert {item.filename for item in found} <= {__file__}
        self.texts = [str(item.message) for item in found]
        self.lines = [item.lineno for item in found]

    @property
    def text(self) -> str:
        (text,) = self.texts
        return text


def here(offset: int = 0) -> int:
    """The number of a line: that of the call, or one further on."""
    frame = inspect.currentframe()
    assert isinstance(frame, FrameType)
    assert frame.f_back is not None
    return frame.f_back.f_lineno + offset


def events(path: Path) -> list[Event]:
    with tmm.open_run(path) as run:
        return run.events


def steps(path: Path) -> list[int]:
    with tmm.open_run(path) as run:
        return [int(step) for step in run.steps]


def train(model: Any) -> Tensor:
    loss: Tensor = model(X).square().mean()
    loss.backward()
    return loss


def start(root: Path, **options: Any) -> tmm.LiveRun:
    return tmm.start_run("p", root=root, system_seconds=None, **options)


# No step at all


@pytest.mark.parametrize("way", ["plain", "compiled", "function", "in memory"])
def test_a_training_without_steps(tmp_path: Path, way: str) -> None:
    model: Any = network()
    run = None if way == "in memory" else tmp_path
    called: Callable[..., Any] = model
    if way == "compiled":
        called = model = torch.compile(model, backend="eager")
    if way == "function":

        def step(x: Tensor) -> Tensor:
            output: Tensor = model(x)
            return output

        called = tmm.instrument(step, RMS, run, module=model)
    else:
        tmm.instrument(model, RMS, run)
    with Told() as told:
        line = here(2)
        for _ in range(30):
            called(X).sum().backward()
    assert told.lines == [line]
    assert "20 forward passes of the instrumented model ran in training mode" in told.text
    assert "no step was opened" in told.text
    assert tmm.explain(called).unmeasured["steps"] == told.text
    with Told() as later:
        tmm.remove(called)
    assert later.texts == []
    if run is not None:
        assert events(tmp_path) == [Event(0, "gap", told.text)]


def test_a_short_training_without_steps_is_told_when_it_ends(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    for _ in range(3):
        train(model)
    with Told() as told:
        tmm.remove(model)
    assert "3 forward passes" in told.text
    assert events(tmp_path) == [Event(0, "gap", told.text)]


def test_what_comes_before_the_first_step_is_no_training(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    with Told() as told:
        model.eval()
        for _ in range(30):
            model(X)  # an evaluation of the model as it is
        model.train()
        with torch.no_grad():
            for _ in range(30):
                model(X)
        for _ in range(19):
            model(X)
        tmm.monitor(model).prepare(X)
        for step in range(30):
            with tmm.monitor(model).step(step):
                train(model)
            train(model)
        tmm.remove(model)
    assert told.texts == []
    assert events(tmp_path) == []


def test_a_model_that_is_compiled_afterwards(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    monitor = tmm.monitor(model)
    model.compile(backend="eager")
    with Told() as told:
        for step in range(3):
            with monitor.step(step):
                model(X)
    assert "call it before tmm.instrument" in told.text
    monitor.close()
    assert [event.text for event in events(tmp_path)] == [told.text]


def test_a_part_that_is_compiled_afterwards_is_measured_as_before() -> None:
    model = tmm.instrument(network(), RMS)
    model[0].compile(backend="eager")
    with Told() as told, tmm.monitor(model).step(0):
        model(X)
    assert told.texts == []
    assert {f"activation/{name}/rms" for name in ("[root module]", "0", "1", "2")} == set(
        tmm.monitor(model).get_step_metrics()
    )


def test_a_run_that_is_never_used_is_told_nothing(tmp_path: Path) -> None:
    with Told() as told:
        tmm.remove(tmm.instrument(network(), RMS, tmp_path))
        with start(tmp_path / "runs") as run:
            run.watch(network())
    assert told.texts == []


# Steps that are not opened as they should be


def test_a_step_without_with(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    monitor = tmm.monitor(model)
    with Told() as told:
        line = here(2)
        for step in range(5):
            monitor.step(step)
            train(model)
    assert told.lines == [line]
    assert told.text.startswith("monitor.step(0) opens no step by itself")
    assert tmm.explain(model).unmeasured["steps"] == told.text
    with Told() as later:
        tmm.remove(model)
    assert later.texts == []
    assert events(tmp_path) == [Event(0, "gap", told.text)]


def test_one_step_without_with_is_told_when_the_run_ends(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    tmm.monitor(model).step(0)
    train(model)
    with Told() as told:
        tmm.remove(model)
    assert told.text.startswith("monitor.step(0) opens no step by itself")


def test_a_block_may_be_entered_later(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    with Told() as told:
        for step in range(3):
            block = tmm.monitor(model).step(step)
            with block as monitored:
                assert monitored
                train(model)
        tmm.remove(model)
    assert told.texts == []
    assert steps(tmp_path) == [0, 1, 2]


def test_steps_that_are_begun_and_never_ended(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    monitor = tmm.monitor(model)
    with Told() as told:
        line = here(2)
        for step in range(4):
            monitor.begin_step(step)
            train(model)
    assert told.lines == [line]
    assert "step 0 was not ended before step 1" in told.text
    assert tmm.explain(model).unmeasured["steps"] == told.text
    tmm.remove(model)
    found = events(tmp_path)
    assert Event(0, "note", told.text) in found
    assert [event.step for event in found if event.kind == "gap"] == [0, 1, 2, 3]


@pytest.mark.parametrize("inner", ["with", "begin and end", "begin"])
@pytest.mark.parametrize("number", [1, 0])
def test_a_step_inside_of_another_one(tmp_path: Path, inner: str, number: int) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    monitor = tmm.monitor(model)

    def nested() -> None:
        if inner == "with":
            with monitor.step(number) as monitored:
                assert monitored == (number == 0)
                model(100 * X)
            return
        monitor.begin_step(number)
        model(100 * X)
        if inner == "begin and end":
            monitor.end_step()

    with Told() as told:
        with monitor.step(0):
            model(X)
            nested()
            if inner != "begin":
                assert monitor.is_monitoring()
                model(X)
        alone = monitor.get_step_metrics()["activation/0/rms"]
        with monitor.step(2):
            model(X)
    assert f"step {number} begins inside of the block of step 0" in told.text
    plain = monitor.get_step_metrics()["activation/0/rms"]
    if number == 0:
        assert alone > 10 * plain  # it is one with the outer step
    else:
        assert alone == plain
    assert tmm.explain(model).unmeasured["steps"] == told.text
    tmm.remove(model)
    assert steps(tmp_path) == [0, 2]
    assert events(tmp_path) == [Event(number, "note" if number == 0 else "gap", told.text)]


def test_an_exception_inside_of_a_nested_step_drops_the_outer_one(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    monitor = tmm.monitor(model)
    with pytest.raises(KeyError), Told(), monitor.step(0), monitor.step(1):
        raise KeyError("x")
    assert not monitor.is_step_open
    for step in (1, 2):
        with monitor.step(step):
            model(X)
    tmm.remove(model)
    assert steps(tmp_path) == [1, 2]
    assert [event.step for event in events(tmp_path)] == [1, 0]


def test_a_step_of_the_run_inside_of_a_block_ends_that(tmp_path: Path) -> None:
    with Told() as told, start(tmp_path) as run:
        model = run.watch(network(), RMS)
        assert run.monitor is not None
        for step in range(3):
            with run.monitor.step(step):
                train(model)
                run.log({"loss": step})
                run.step()
    assert told.texts == []
    assert steps(run.path) == [0, 1, 2]


# Steps that are counted in another way


@pytest.mark.parametrize("batches", [50, 2, 3])
def test_a_step_for_each_epoch(tmp_path: Path, batches: int) -> None:
    """Each batch is ended as the step of its epoch, so that the last one of an epoch is left."""
    model = tmm.instrument(network(), RMS, tmp_path)
    with Told() as told:
        line = here(3)
        for epoch in range(4):
            for _ in range(batches):
                with tmm.monitor(model).step(epoch):
                    train(model)
    assert told.lines == [line]
    assert "3 records gave way to later ones of the same step" in told.text
    assert "Count the steps of the training, not its epochs" in told.text
    assert tmm.explain(model).unmeasured["steps"] == told.text
    tmm.remove(model)
    assert steps(tmp_path) == [0, 1, 2, 3]
    first, last = events(tmp_path)
    assert first.text == told.text
    assert last.text.startswith(f"{4 * (batches - 1)} records gave way")


def test_a_step_that_is_repeated_now_and_then_is_nothing_to_tell(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, tmp_path)
    with Told() as told:
        for step in (0, 1, 1, 2, 3, 3, 4):
            with tmm.monitor(model).step(step):
                train(model)
        tmm.remove(model)
    assert told.texts == []


@pytest.mark.parametrize("way", ["with", "begin", "resumed"])
def test_steps_that_go_backwards(tmp_path: Path, way: str) -> None:
    """Epochs that count from zero: the error says how to count."""
    model = tmm.instrument(network(), RMS, tmp_path)
    monitor = tmm.monitor(model)
    for step in range(3):
        with monitor.step(step):
            train(model)
    with pytest.raises(ValueError, match=r"step=0 lies before .* 2; .*epoch \* len\(batches\)"):
        if way == "with":
            with monitor.step(0):
                pass
        else:
            monitor.begin_step(0)
    tmm.remove(model)
    assert steps(tmp_path) == [0, 1, 2]
    if way == "resumed":  # docs/how-to/runs.md: what was recorded from there on no longer counts
        model = tmm.instrument(network(), RMS, tmp_path, resume=True)
        with Told() as told, tmm.monitor(model).step(0):
            train(model)
        assert "up to step 2, no longer counts" in told.text
        tmm.remove(model)
        assert steps(tmp_path) == [0]


# No run.step


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("count", [50, 3, 250])
def test_losses_that_are_logged_in_one_step(tmp_path: Path, model: bool, count: int) -> None:
    line = 0
    with Told() as told, start(tmp_path) as run:  # the line of its end
        end = here(-1)
        if model:
            watched = run.watch(network(), RMS)
        for value in range(count):
            if model:
                train(watched)
            line = here(1)
            run.log({"loss": float(value), "accuracy": 1.0})
        unmeasured = tmm.explain(watched).unmeasured if model else {}
    assert told.lines == [line if count > 100 else end]
    assert told.text.startswith(f"'loss' was logged {min(count, 100)} times in step 0")
    assert "call run.step()" in told.text
    assert events(run.path) == [Event(0, "gap", told.text)]
    if count > 100 and model:
        assert unmeasured["steps"] == told.text
    with tmm.open_run(run.path) as read:
        assert read.series("loss")[1].tolist() == [count - 1]


@pytest.mark.parametrize("way", ["step", "log", "monitor", "once", "fails"])
def test_runs_whose_steps_somebody_ends(tmp_path: Path, way: str) -> None:
    with Told() as told:
        try:
            with start(tmp_path) as run:
                model = tmm.instrument(network(), RMS, run=run) if way == "monitor" else None
                for step in range(1 if way == "once" else 40):
                    if model is not None:
                        with tmm.monitor(model).step(step):
                            train(model)
                            run.log({"loss": 1.0})
                        continue
                    run.log({"loss": 1.0}, step=step if way == "log" else None)
                    run.log({"loss": 2.0})
                    if way == "step":
                        run.step()
                if way == "fails":
                    raise KeyError
        except KeyError:
            pass
    assert told.texts == []
    assert events(run.path) == []


@pytest.mark.parametrize("given", [True, False])
def test_optimizer_steps_that_are_joined_to_one(tmp_path: Path, given: bool) -> None:
    model = network()
    optimizer, other = SGD(model.parameters(), 0.1), SGD(nn.Linear(1, 1).parameters(), 0.1)
    with Told() as told, start(tmp_path) as run:
        end = here(-1)
        run.watch(model, PARAMETERS, optimizer=optimizer if given else None)
        for _ in range(5):
            train(model)
            optimizer.step()
            other.step()
    assert told.lines == [end]
    assert told.text.startswith("5 optimizer steps ran in step 0, which are recorded as one")
    assert events(run.path) == [Event(0, "gap", told.text)]


def test_many_optimizer_steps_in_one_are_told_as_they_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reminder, "_MANY_UPDATES", 7)
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    with start(tmp_path) as run:
        run.watch(model, RMS)
        with Told() as told:
            for _ in range(10):
                train(model)
                line = here(1)
                optimizer.step()
        with Told() as later:
            run.step()
    assert told.lines == [line]
    assert "7 optimizer steps ran in step 0" in told.text
    assert later.texts == []


def test_an_algorithm_with_several_optimizer_steps_in_a_step(tmp_path: Path) -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    with Told() as told, start(tmp_path) as run:
        run.watch(model, RMS, optimizer=optimizer)
        for _ in range(3):
            for _ in range(20):
                train(model)
                optimizer.step()
                run.log({"loss": 1.0})
            run.step()
    assert told.texts == []
    assert not optimizer._optimizer_step_post_hooks


# Optimizers and parameters


@pytest.mark.parametrize("rule", ["gradient", "update", "parameter", "optimizer_state"])
def test_rules_of_parameters_and_no_optimizer(tmp_path: Path, rule: str) -> None:
    metric = {"parameter": "rms", "optimizer_state": "exp_avg_norm"}.get(rule, "norm")
    spec = tmm.Spec(getattr(tmm, rule)(metric))
    model = tmm.instrument(network(), spec, tmp_path)
    optimizer = Adam(model.parameters())
    with Told() as told:
        line = here(2)
        for step in range(3):
            with tmm.monitor(model).step(step):
                train(model)
                optimizer.step()
    assert told.lines == [line]
    assert f"rules of {rule} have no rows. Call monitor.watch(optimizer)" in told.text
    explanation = tmm.explain(model)
    names = [name for name, _ in model.named_parameters()]
    reason = "no optimizer is watched: call monitor.watch(optimizer)"
    assert explanation.without_rows == {f"{rule} of {name}": reason for name in names}
    assert f"tmm.{rule}({metric!r}): 0 of 4 parameters\n" in str(explanation)
    assert f"    without rows: {', '.join(names)}: {reason}" in str(explanation)
    tmm.remove(model)
    assert events(tmp_path) == [Event(0, "note", told.text)]
    with tmm.open_run(tmp_path) as run:
        assert reason in run.text("explain.txt")


def frozen(model: nn.Sequential) -> SGD:
    model[0].requires_grad_(False)
    return SGD((p for p in model.parameters() if p.requires_grad), 0.1)


def frozen_and_held(model: nn.Sequential) -> SGD:
    model[0].requires_grad_(False)
    return SGD(model.parameters(), 0.1)


def not_held(model: nn.Sequential) -> SGD:
    return SGD(model[2].parameters(), 0.1)


def not_used(model: nn.Sequential) -> SGD:
    model[0].forward = lambda x: torch.ones(4, 4)  # type: ignore[method-assign]
    return SGD(model.parameters(), 0.1)


REASONS = {
    frozen: "frozen: requires_grad is False",
    frozen_and_held: "frozen: requires_grad is False",
    not_held: "no optimizer that is watched holds it",
    not_used: "it had no gradient when its optimizer stepped",
}


@pytest.mark.parametrize("make", REASONS, ids=lambda make: make.__name__)
def test_parameters_without_rows_are_named(
    tmp_path: Path, make: Callable[[nn.Sequential], SGD]
) -> None:
    model = network()
    optimizer = make(model)
    tmm.instrument(model, PARAMETERS, tmp_path)
    monitor = tmm.monitor(model)
    monitor.watch(optimizer)
    assert tmm.explain(model).without_rows == {}  # nothing is known yet
    with Told() as told:
        for step in range(3):
            with monitor.step(step):
                train(model)
                optimizer.step()
                optimizer.zero_grad()
    explanation = tmm.explain(model)
    assert explanation.without_rows == {
        f"{family} of 0.{name}": REASONS[make]
        for family in ("gradient", "update")
        for name in ("weight", "bias")
    }
    assert [rule.silent for rule in explanation.rules] == [
        *(("0.weight", "0.bias"), (), ("0.weight", "0.bias"))
    ]
    text = str(explanation)
    assert "tmm.gradient('norm'): 2 of 4 parameters\n    2.weight\n    2.bias\n" in text
    assert f"    without rows: 0.weight, 0.bias: {REASONS[make]}\n" in text
    assert "tmm.parameter('rms'): 4 of 4 parameters\n" in text
    tmm.remove(model)
    with tmm.open_run(tmp_path) as run:
        assert f"without rows: 0.weight, 0.bias: {REASONS[make]}" in run.text("explain.txt")
        assert len(run.keys("gradient/")) == len(run.keys("update/")) == 2
        assert len(run.keys("parameter/")) == 4
    if make is not_held:  # they have gradients, which somebody asked for
        assert told.text.startswith("no optimizer that is watched holds 0.weight and 1 more")
        assert events(tmp_path) == [Event(0, "note", told.text)]
    else:
        assert told.texts == []
        assert events(tmp_path) == []


def test_the_page_of_an_explanation_names_parameters_without_rows(tmp_path: Path) -> None:
    model = network()
    optimizer = frozen(model)
    tmm.instrument(model, PARAMETERS)
    tmm.monitor(model).watch(optimizer)
    with tmm.monitor(model).step(0):
        train(model)
        optimizer.step()
    page = tmm.explain(model).to_html(tmp_path / "page.html").read_text()
    assert "gradient of 0.weight" in page
    assert "frozen: requires_grad is False" in page


def same(model: nn.Module) -> torch.optim.Optimizer:
    return Adam(model.parameters(), 0.1)


def of_a_part(model: nn.Module) -> torch.optim.Optimizer:
    return SGD(model[2].parameters(), 0.1)  # type: ignore[index]


def of_new_parameters(model: nn.Module) -> torch.optim.Optimizer:
    for layer in (model[0], model[2]):  # type: ignore[index]
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer.bias = nn.Parameter(layer.bias.detach().clone())
    return SGD(model.parameters(), 0.1)


@pytest.mark.parametrize("make", [same, of_a_part, of_new_parameters], ids=lambda m: m.__name__)
def test_an_optimizer_that_is_made_anew(
    tmp_path: Path, make: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    """It is measured where it takes the place of one that is watched, and named otherwise."""
    model = network()
    optimizer: torch.optim.Optimizer = SGD(model.parameters(), 0.1)
    tmm.instrument(model, PARAMETERS, tmp_path)
    monitor = tmm.monitor(model)
    monitor.watch(optimizer)
    optimizer = make(model)
    with Told() as told:
        for step in range(3):
            with monitor.step(step):
                train(model)
                optimizer.step()
                optimizer.zero_grad()
    unmeasured = tmm.explain(model).without_rows
    tmm.remove(model)
    with tmm.open_run(tmp_path) as run:
        measured = run.keys("gradient/")
    assert len(measured) == {same: 4, of_a_part: 2, of_new_parameters: 0}[make]
    if make is of_new_parameters:
        assert any("an optimizer that is not watched stepped in step 0" in t for t in told.texts)
        assert unmeasured["gradient of 0.weight"] == "no optimizer that is watched holds it"
    else:
        assert told.texts == []
    if make is of_a_part:
        assert set(unmeasured) == {
            f"{family} of 0.{name}"
            for family in ("gradient", "update")
            for name in ("weight", "bias")
        }


def test_an_optimizer_that_is_watched_for_nothing(tmp_path: Path) -> None:
    """As where a new spec was made, and neither the model instrumented anew nor its monitor got."""
    model = tmm.instrument(network(), RMS, tmp_path)
    optimizer = SGD(model.parameters(), 0.1)
    with Told() as told:
        line = here(1)
        tmm.monitor(model).watch(optimizer)
        with tmm.monitor(model).step(0):
            train(model)
            optimizer.step()
    assert told.lines == [line]
    assert "nothing is measured at its steps" in told.text
    assert "tmm.Spec(tmm.activation('rms'), every=1)" in told.text
    tmm.remove(model)
    assert events(tmp_path) == [Event(0, "note", told.text)]


@pytest.mark.parametrize("way", ["run", "scaler", "gradients of activations", "session"])
def test_optimizers_that_are_watched_for_good_reasons(tmp_path: Path, way: str) -> None:
    model = network()
    optimizer = SGD(model.parameters(), 0.1)
    with Told() as told:
        if way == "run":
            with start(tmp_path) as run:
                run.watch(model, RMS, optimizer=optimizer)
        elif way == "session":
            from tmm.integrations.session import Session

            session = Session(RMS, None, {"root": tmp_path, "system_seconds": None})
            session.open()
            session.instrument(model)
            session.watch(optimizer)
            session.close()
        else:
            spec = RMS if way == "scaler" else tmm.Spec(tmm.activation_gradient("rms"))
            tmm.instrument(model, spec)
            scaler = torch.amp.GradScaler("cpu") if way == "scaler" else None
            tmm.monitor(model).watch(optimizer, scaler)
    assert told.texts == []


def test_gradients_of_activations_without_a_backward_pass(tmp_path: Path) -> None:
    model = tmm.instrument(network(), tmm.Spec(tmm.activation_gradient("rms")), tmp_path)
    monitor = tmm.monitor(model)
    with Told() as told:
        for step in range(3):
            line = here(1)
            with monitor.step(step), torch.no_grad():
                model(X)
    assert told.lines == [line]
    assert "no gradient of an activation came in the monitored step 0" in told.text
    assert tmm.explain(model).unmeasured == {"activation_gradient": told.text}
    with Told() as later, monitor.step(3):
        train(model)
    assert later.texts == []
    tmm.remove(model)
    assert events(tmp_path) == [Event(0, "note", told.text)]


# A monitor, and a model, after the end


@pytest.mark.parametrize("way", ["removed", "run", "compiled", "function"])
def test_a_monitor_that_was_taken_off(tmp_path: Path, way: str) -> None:
    model: Any = network()
    if way == "compiled":
        model = torch.compile(model, backend="eager")
    run = start(tmp_path / "runs") if way == "run" else None
    called = model
    if way == "function":
        called = tmm.instrument(lambda x: model(x), RMS, module=model)
    else:
        tmm.instrument(model, RMS, run or tmp_path / "r")
    monitor = tmm.monitor(called)
    with monitor.step(0):
        train(called)
    if run is None:
        tmm.remove(called)
    else:
        run.finish()
    with Told() as told:
        for step in range(1, 4):
            line = here(1)
            with monitor.step(step) as monitored:
                assert not monitored
                train(called)
                monitor.log_scalar("loss", 1.0)
                monitor.log_scalar("loss", 1.0, force=True)
    assert told.lines == [line]
    assert "the monitor was taken off its model" in told.text
    assert monitor.get_step_metrics() == {}


WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": lambda net: net,
    "wrapped": lambda net: torch.compile(net, backend="eager"),
    "in place": lambda net: (net.compile(backend="eager"), net)[1],
    "block by block": lambda net: (net[0].compile(backend="eager"), net)[1],  # type: ignore[index]
}


def state_of(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in vars(part).items() if value is not None}
        for part in model.modules()
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("end", ["block", "error", "finish", "stop", "current"])
def test_a_model_is_as_before_when_its_run_has_ended(tmp_path: Path, way: str, end: str) -> None:
    model = WAYS[way](network())
    before = state_of(model)
    optimizer = SGD(model.parameters(), 0.1)
    for _ in range(2):  # and can be watched once more
        if end == "current":
            tmm.init("p", root=tmp_path, system_seconds=None)
            tmm.watch(model, PARAMETERS)
            train(model)
            optimizer.step()
            tmm.step()
            tmm.finish()
        else:
            try:
                with start(tmp_path) as run:
                    run.watch(model, PARAMETERS)
                    train(model)
                    optimizer.step()
                    run.step()
                    if end == "error":
                        raise KeyError
                    if end == "finish":
                        run.finish()
                    if end == "stop":
                        run.stop_early("enough")
            except KeyError:
                pass
        assert state_of(model) == before
        assert not optimizer._optimizer_step_pre_hooks
        with pytest.raises(ValueError, match="its run has ended.*explain.txt"):
            tmm.explain(model)
    assert tmm.remove(model) is model  # as before there was no need to
    assert len(tmm.list_runs(tmp_path)) == 2
    tmm.instrument(model, RMS)
    tmm.remove(model)
    with pytest.raises(ValueError, match="is not instrumented; call tmm.instrument"):
        tmm.remove(model)
    assert state_of(model) == before


# Calls that cannot mean what they say


class Trainer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def training_step(self, x: Tensor) -> Tensor:
        output: Tensor = self.layer(x)
        return output


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda net: torch.compile(torch.compile(net, backend="eager"), backend="eager"),
            ValueError,
            "is the compiled forward of Sequential.*it was applied twice",
        ),
        (lambda net: net.forward, ValueError, "is the forward of Sequential; give the module"),
        (lambda net: Trainer().training_step, ValueError, r"instrument\(model.training_step, spec"),
        (lambda net: type(net), ValueError, r"is a class; give a module of it: Sequential\(...\)"),
        (lambda net: torch.nn, TypeError, "is a module of Python, not a torch.nn.Module"),
        (lambda net: 3, TypeError, "model=3 is neither a module nor a function"),
        (lambda net: lambda x: x, ValueError, "is a function; say whose modules to measure"),
    ],
)
def test_what_is_no_model_is_said_by_name(
    tmp_path: Path, make: Callable[[nn.Module], Any], error: type[Exception], message: str
) -> None:
    given = make(network())
    with pytest.raises(error, match=message):
        tmm.instrument(given, RMS)
    with pytest.raises(error, match=message), start(tmp_path) as run:
        run.watch(given)


# What goes wrong in the end of a step


def fail(values: Tensor) -> Tensor:
    raise ZeroDivisionError("no mean")


class Failing:
    """An aggregate that fails while it is told to, with any error."""

    def __init__(self) -> None:
        self.error: BaseException | None = None

    def __call__(self, values: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return values.mean()


@pytest.mark.parametrize("driven", ["monitor", "run"])
@pytest.mark.parametrize(
    "error", [ZeroDivisionError("no mean"), KeyboardInterrupt(), SystemExit(3)], ids=type
)
@pytest.mark.parametrize("first", [True, False])
def test_what_ends_end_step_leaves_a_gap(
    tmp_path: Path, driven: str, error: BaseException, first: bool
) -> None:
    aggregate = Failing()
    spec = tmm.Spec(tmm.activation(mine=lambda x: x.sum(), aggregate=aggregate))
    model = network()
    run = start(tmp_path / "runs") if driven == "run" else None
    if run is not None:
        run.watch(model, spec)
    else:
        tmm.instrument(model, spec, tmp_path / "r")
    monitor = tmm.monitor(model)
    path = monitor.path
    assert path is not None

    def step(number: int) -> None:
        if run is not None:
            model(X)
            run.step()
        else:
            with monitor.step(number):
                model(X)

    is_borne = isinstance(error, Exception) and not first
    if not first:
        step(0)
    aggregate.error = error
    with Told() as told:
        if is_borne:
            step(1)
        else:
            with pytest.raises((type(error), ValueError)):
                step(0 if first else 1)
    assert [text.startswith("monitoring failed on step 1") for text in told.texts] == (
        [True] if is_borne else []
    )
    aggregate.error = None
    if run is not None:
        run.finish()
    else:
        tmm.remove(model)
    lost = 0 if first else 1
    (gap,) = [event for event in events(path) if event.kind == "gap"]
    assert gap.step == lost
    assert type(error).__name__ in gap.text or "no mean" in gap.text
    with tmm.open_run(path) as recorded:  # what the run itself logs of the step is kept
        left = recorded.at(lost) if lost in recorded.steps else {}
    assert not [key for key in left if not key.startswith("system/")]


@pytest.mark.parametrize("first", [True, False])
def test_an_aggregate_that_fails_in_the_thread_of_the_writer(
    tmp_path: Path, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator or with other ranks, where ``end_step`` waits for nothing."""
    monkeypatch.setattr("tmm.runtime.step_collector.StepCollector.is_on_host", False)
    aggregate = Failing()
    spec = tmm.Spec(tmm.activation(mine=lambda x: x.sum(), aggregate=aggregate))
    model = tmm.instrument(network(), spec, tmp_path)
    monitor = tmm.monitor(model)
    for step in range(5):
        aggregate.error = ZeroDivisionError("no mean") if step == (0 if first else 2) else None
        is_raised = pytest.raises(ValueError, match="no mean")
        with Told() as told, is_raised if first and step == 1 else nullcontext():
            with monitor.step(step):
                model(X)
            steps_of(model).archive.flush()
        assert bool(told.texts) == (not first and step == 3)  # at the step after it
    tmm.remove(model)
    (gap,) = [event for event in events(tmp_path) if event.step == (0 if first else 2)]
    assert gap.kind == "gap"
    assert "no mean" in gap.text
    assert (0 if first else 2) not in steps(tmp_path)
    assert steps(tmp_path)[-2:] == [3, 4]


def test_an_interrupt_while_a_record_is_written_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> bool:
        raise KeyboardInterrupt

    model = tmm.instrument(network(), RMS, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("tmm.runtime.store.run_writer._Channel.wait_written", interrupted)
        with pytest.raises(KeyboardInterrupt), tmm.monitor(model).step(0):
            model(X)
    tmm.remove(model)
    assert steps(tmp_path) == [0]
    assert events(tmp_path) == []


def test_an_interrupt_while_an_optimizer_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    model = tmm.instrument(network(), RMS, tmp_path)
    monitor = tmm.monitor(model)
    with monkeypatch.context() as patched:
        patched.setattr(Watch, "end_step", interrupted)
        with pytest.raises(KeyboardInterrupt), monitor.step(0):
            model(X)
    assert not monitor.is_step_open
    with monitor.step(1):
        model(X)
    tmm.remove(model)
    assert steps(tmp_path) == [1]
    assert events(tmp_path) == [Event(0, "gap", "ended by KeyboardInterrupt: ")]


# Sinks


class Sink:
    """Raises when it is opened, called or closed."""

    def __init__(self, place: str, error: BaseException) -> None:
        self.place, self.error = place, error

    def _at(self, place: str) -> None:
        if place == self.place:
            raise self.error

    def open(self, run: object) -> Sink:
        self._at("open")
        return self

    def __call__(self, step: int, values: object) -> None:
        self._at("call")

    def close(self, status: str) -> None:
        self._at("close")


@pytest.mark.parametrize("place", ["open", "call", "close"])
@pytest.mark.parametrize("error", [OSError("no net"), SystemExit(3), SystemExit()], ids=repr)
def test_a_sink_that_fails_is_told_where_the_run_was_started(
    tmp_path: Path, place: str, error: BaseException
) -> None:
    sinks = [Sink(place, error)]
    with Told() as told:
        line = here(1)
        run = tmm.start_run("p", root=tmp_path, system_seconds=None, sinks=sinks)
        for value in range(3):
            run.log({"loss": value})
            run.step()
        run.finish()
    name = {"open": "cannot be opened", "call": "failed at step 0", "close": "could not be closed"}
    assert told.lines == [line]
    assert name[place] in told.text
    assert type(error).__name__ in told.text
    with tmm.open_run(run.path) as read:
        assert read.series("loss")[1].tolist() == [0, 1, 2]
        assert read.state is not None
        assert read.state.status == "finished"


# Which line is the user's


def called_by(names: Sequence[str], function: Callable[[], Any]) -> Any:
    """What ``function`` gives when modules of these names call one another, and the last one it."""
    for name in reversed(names):
        scope: dict[str, Any] = {"__name__": name, "inner": function}
        exec(compile("def call():\n    return inner()", f"<{name}>", "exec"), scope)
        function = scope["call"]
    return function()


@pytest.mark.parametrize(
    "names",
    [
        ["tmm.monitor"],
        ["torch.nn.modules.module", "tmm.instrumentation.switch"],
        ["contextlib", "tmm.monitor"],
        ["lightning.pytorch.trainer.trainer", "tmm.integrations.lightning", "tmm.monitor"],
        ["pytorch_lightning.trainer", "lightning_utilities.core", "tmm.integrations.lightning"],
        ["transformers.trainer", "accelerate.optimizer", "tmm.integrations.transformers"],
        ["torchtnt.framework.train", "tmm.integrations.torchtnt"],
    ],
)
def test_warnings_name_the_line_of_the_user(names: list[str]) -> None:
    """Not that of a framework which the user calls; code that the framework calls is a user's."""
    for users in (["program"], ["program", "transformers.trainer", "torch_like_package"]):
        expected = f"<{users[-1]}>"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            called_by([*users, *names], partial(gaps.warn, "text"))
        assert [(item.filename, item.lineno) for item in caught] == [(expected, 2)]
        line = called_by([*users, *names], UserLine.here)
        assert (line.file, line.number, line.module) == (expected, 2, users[-1])


def test_what_is_told_at_the_end_of_a_process_names_its_line(
    tmp_path: Path, interpreters: Interpreters
) -> None:
    code = """import sys, tmm
run = tmm.start_run("p", root=sys.argv[1], system_seconds=None)
for value in range(9):
    run.log({"loss": value})
"""
    program = tmp_path / "program.py"
    program.write_text(code)
    as_main = "import runpy, sys; runpy.run_path(sys.argv[2], run_name='__main__')"
    done = interpreters.run(as_main, tmp_path / "runs", program)
    assert done.returncode == 0, done.stderr
    assert f"{program}:2: MonitoringWarning: 'loss' was logged 9 times in step 0" in done.stderr


def test_a_warning_of_a_thread_that_is_an_error_ends_nothing() -> None:
    line = UserLine.here()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        line.warn("text")
        line.warn("text", RuntimeWarning)


def test_a_kind_of_warning_is_told_once_and_kept() -> None:
    told_by = Gaps("raise")
    with Told() as told:
        for step in range(3):
            told_by.warn_once("kind", step, "text")
            told_by.warn_once("other", step, "more", event="gap")
    assert told.texts == ["text", "more"]
    assert told_by.take_events() == (Event(0, "note", "text"), Event(0, "gap", "more"))


def test_a_function_that_calls_another_module() -> None:
    other = network()
    function = tmm.instrument(lambda x: other(x).sum(), RMS, module=network())
    monitor = tmm.monitor(function)
    with Told() as told:
        for step in range(2):
            with monitor.step(step):
                function(X).backward()
    assert "called no module that a rule of activation matches" in told.text


def test_gradients_that_were_zeroed_before_they_were_measured() -> None:
    model = tmm.instrument(network(), tmm.Spec(tmm.gradient("norm")))
    monitor = tmm.monitor(model)
    with Told() as told, monitor.step(0):
        model(X).sum().backward()
        model.zero_grad()
        monitor.monitor_gradients()
    assert "before optimizer.zero_grad()" in told.text


def test_an_optimizer_without_the_state_that_is_asked_for() -> None:
    model = tmm.instrument(network(), tmm.Spec(tmm.optimizer_state("exp_avg_norm")))
    monitor, optimizer = tmm.monitor(model), SGD(model.parameters(), 0.1)
    monitor.watch(optimizer)
    with Told() as told:
        for step in range(2):
            with monitor.step(step):
                model(X).sum().backward()
                optimizer.step()
    assert "keep nothing of what rules of optimizer_state ask for" in told.text
    reasons = set(tmm.explain(model).without_rows.values())
    assert reasons == {"its optimizer keeps nothing of what is asked"}


def test_an_optimizer_is_watched_after_the_end() -> None:
    model = tmm.instrument(network(), PARAMETERS)
    monitor = tmm.monitor(model)
    tmm.remove(model)
    with Told() as told:
        monitor.watch(SGD(model.parameters(), 0.1))
    assert "nothing is recorded" in told.text


def test_compiled_in_place_after_it_was_instrumented() -> None:
    model = tmm.instrument(network(), RMS)
    model.compile(backend="eager")
    with pytest.raises(ValueError, match=r"model\.compile\(\) before that, not after"):
        tmm.monitor(model)


def test_no_step_is_monitored(tmp_path: Path) -> None:
    spec = tmm.Spec(tmm.activation("rms"), every=100)
    model = tmm.instrument(network(), spec, run=tmp_path / "run")
    monitor = tmm.monitor(model)
    with Told() as told:
        for step in range(1, 9):
            with monitor.step(step):
                model(X)
        tmm.remove(model)
    assert "8 steps were opened and none of them is monitored" in told.text
    assert "choose another every=" in told.text
    with tmm.open_run(tmp_path / "run") as run:
        assert [event.text for event in run.events] == told.texts


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_function_that_calls_its_module_is_not_warned_of(in_parts: bool) -> None:
    model = network()
    parts = list(model) if in_parts else None
    function = tmm.instrument(
        lambda x: model[2](model[1](model[0](x))).sum(), RMS, module=model, parts=parts
    )
    with Told() as told, tmm.monitor(function).step(0):
        function(X).backward()
    assert not told.texts
    assert "activation/2/rms" in tmm.monitor(function).get_step_metrics()
