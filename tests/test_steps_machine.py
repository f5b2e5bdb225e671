"""The life of steps as state machines: whatever the order of calls, each step records what eager
computation gives, and the training is that of a copy of the model that nobody monitors."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import tmm
from tests.step_trainings import SPEC, Net, Pass, Step, Training, Values, check_same, recorded
from tmm.runs.delivery import Value
from tmm.runs.instrument import steps_of
from tmm.runs.live import LiveRun

batches = st.lists(st.integers(-9, 9), min_size=1, max_size=3)
factors = st.sampled_from([1.0, 2.0, -3.0])
numbers = st.integers(-9, 9).map(float)
keys = st.sampled_from(["loss", "accuracy"])
either = st.booleans()
mostly = st.sampled_from([True, True, False])


class Recording:
    """A run in a folder of its own, and the last that a sink of it was told of each step."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp())
        self.told: dict[int, Values] = {}
        self.run = tmm.start_run("p", root=self.root, system_seconds=None, sinks=[self.tell])

    def tell(self, step: int, values: Mapping[str, Value]) -> None:
        self.told[step] = dict(values)  # type: ignore[arg-type]

    def check_end(self, expected: dict[int, Values]) -> None:
        """The run is finished."""
        check_same(recorded(self.run), expected)
        check_same(self.told, expected)
        shutil.rmtree(self.root)


class Explicit(Training):
    """Steps that begin and end by calls of the monitor, recorded in memory or in a run.

    ``late`` is what was logged into the run when no step was open: it belongs to the step
    ``ended``, the last one, and before any to the ``next`` one: ``early`` is what it took.
    """

    def __init__(self, run: LiveRun | None = None) -> None:
        super().__init__(run)
        self.number = 0
        self.last: Values = {}
        self.late: Values = {}
        self.early: Values = {}
        self.next = 0
        self.ended: int | None = None
        self.ended_before: int | None = None
        self.gaps: list[int] = []

    def begin(self, ahead: int) -> None:
        step = self.number + ahead
        assert self.monitor.begin_step(step) == (step % 2 == 0)
        self.begun(ahead)

    def begun(self, ahead: int) -> None:
        self.drop()
        self.number += ahead
        self.early = self.late if self.ended is None and self.number == self.next else {}
        if not self.early:
            self.take_late()
        self.open, self.last, self.late = Step(self.number, of_run=dict(self.early)), {}, {}
        self.ended_before, self.ended, self.next = self.ended, None, self.number

    def drop(self) -> None:
        """The open step is not recorded; in a run, what was logged in it is."""
        step, self.open, self.last = self.open, None, {}
        if step is not None:
            self.gaps += [step.number] if step.is_monitored else []
            self.ended = step.number
            if self.run is not None and (logged := step.logged()):
                self.history[step.number] = self.history.get(step.number, {}) | logged

    def take_late(self) -> None:
        if self.late:
            step = self.next if self.ended is None else self.ended
            self.history[step] = self.history.get(step, {}) | self.late

    def end(self) -> None:
        step, self.open = self.open, None
        assert step is not None
        self.monitor.end_step()
        values = step.values(step.likeliest, self.parameters())
        if step.is_monitored or values:
            self.history[step.number] = self.last = values
        self.ended = step.number

    def discard(self) -> None:
        """As if it had not begun."""
        steps_of(self.model).discard_step()
        self.open, self.late, self.ended = None, self.early, self.ended_before

    def log(self, number: float, *, force: bool) -> None:
        self.monitor.log_scalar("scalar", number, force=force)
        if self.open is not None and (force or self.open.is_monitored):
            self.open.scalars.append(number)

    def log_into_run(self, key: str, number: float) -> None:
        if self.run is not None:
            self.run.log({key: number})
            (self.late if self.open is None else self.open.of_run)[key] = number

    def check(self) -> None:
        assert self.monitor.is_monitoring() == self.is_measured
        check_same({0: self.monitor.get_step_metrics()}, {0: self.last})  # type: ignore[dict-item]
        if self.run is None:
            check_same(self.monitor.get_all_metrics(), self.history)  # type: ignore[arg-type]


class Steps(RuleBasedStateMachine):
    """Two models with steps of their own: one is recorded in memory, one in a run."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.run = self.recording.run
        self.training, self.other = Explicit(self.run), Explicit()

    @rule()
    def turn_to_the_other(self) -> None:
        self.training, self.other = self.other, self.training

    @rule(ahead=st.integers(0, 2))
    def begin(self, ahead: int) -> None:
        self.training.begin(ahead)

    @rule(values=batches, training=mostly, gradients=mostly)
    def forward(self, values: list[int], training: bool, gradients: bool) -> None:
        self.training.forward(values, training=training, gradients=gradients)

    @rule(values=batches, number=numbers, is_ahead=either)
    def be_apart(self, values: list[int], number: float, is_ahead: bool) -> None:
        """What is no part of a step."""
        training = self.training
        if is_ahead and training.open is None:
            training.monitor.prepare(training.plain.linear.weight.detach())
            with pytest.raises(RuntimeError, match="no step is open"):
                training.monitor.end_step()
        elif is_ahead:
            training.monitor.after_micro_batch()
            training.fail()
        with training.monitor.no_monitor():
            training.outputs(values, training=True, gradients=True)
            training.monitor.log_scalar("scalar", number)

    @precondition(lambda self: self.training.passes)
    @rule(place=st.integers(-4, -1), factor=factors)
    def backward(self, place: int, factor: float) -> None:
        self.training.backward(place, factor)

    @rule(clears=either)
    def optimize(self, clears: bool) -> None:
        self.training.optimize(clears=clears)

    @rule(number=numbers, force=either)
    def log(self, number: float, force: bool) -> None:
        self.training.log(number, force=force and self.training.open is not None)

    @rule(key=keys, number=numbers)
    def log_into_run(self, key: str, number: float) -> None:
        self.training.log_into_run(key, number)

    @precondition(lambda self: self.training.open is not None)
    @rule()
    def end(self) -> None:
        self.training.end()

    @precondition(lambda self: self.training.open is not None)
    @rule()
    def discard(self) -> None:
        self.training.discard()

    @rule(ahead=st.integers(0, 2), values=batches, key=keys, number=numbers)
    def interrupt(self, ahead: int, values: list[int], key: str, number: float) -> None:
        training = self.training
        with pytest.raises(KeyError), training.monitor.step(training.number + ahead):
            training.begun(ahead)
            training.forward(values, training=True, gradients=True)
            training.backward(-1, 1.0)
            training.optimize(clears=True)
            training.log(number, force=True)
            training.log_into_run(key, number)
            raise KeyError
        training.drop()

    @property
    def of_run(self) -> Explicit:
        return self.other if self.training.run is None else self.training

    @rule()
    def read(self) -> None:
        check_same(recorded(self.run), self.of_run.history)

    @invariant()
    def agrees(self) -> None:
        for training in (self.training, self.other):
            training.check()
            training.check_undisturbed()

    def teardown(self) -> None:
        self.of_run.drop()
        self.of_run.take_late()
        self.run.finish()
        for training in (self.training, self.other):
            tmm.remove(training.model)
            training.check_removed()
        with tmm.open_run(self.run.path) as run:
            dropped = [
                e.step for e in run.events if e.text.startswith(("was not ended", "ended by"))
            ]
        assert dropped == self.of_run.gaps
        self.recording.check_end(self.of_run.history)


class Driven(Training):
    """Steps that ``run.step`` ends: one of nothing is not recorded."""

    run: LiveRun

    def __init__(self, run: LiveRun) -> None:
        super().__init__(run)
        self.open: Step | None = Step(0)
        self.trained: set[bool] = set()  # the modes of passes that a backward pass went through

    def instrumented(self, model: Net) -> Net:
        return self.run.watch(model, SPEC)

    def is_surely_evaluation(self) -> bool:
        return bool(self.trained) or super().is_surely_evaluation()

    def end(self, *, is_ended: bool) -> None:
        step, self.open = self.open, None
        assert step is not None
        counted = self.counted(step, is_ended=is_ended)
        if counted or step.gradients or step.logged():
            self.history[step.number] = step.values(counted, self.parameters())

    def counted(self, step: Step, *, is_ended: bool) -> list[Pass]:
        """The passes of the training; a backward pass may have been left out this time."""
        found = step.likeliest
        if trained := {p.is_training for p in found if p.went_back}:
            self.trained |= trained
        elif self.trained:
            found = [p for p in found if p.has_gradients and p.is_training in self.trained]
            return found if is_ended else []
        return found


class RunSteps(RuleBasedStateMachine):
    """The steps of a run that watches a model."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self.run = self.recording.run
        self.training = Driven(self.run)

    @property
    def step(self) -> Step:
        assert self.training.open is not None
        return self.training.open

    @rule()
    def end(self) -> None:
        number = self.step.number + 1
        assert self.run.step() == number
        self.training.end(is_ended=True)
        self.training.open = Step(number)

    @rule(number=numbers, ahead=st.integers(0, 3))
    def log(self, number: float, ahead: int) -> None:
        step = self.step.number + ahead
        self.run.log({"loss": number}, step=step)
        if ahead:
            self.training.end(is_ended=True)
            self.training.open = Step(step)
        self.step.of_run["loss"] = number

    @rule(number=numbers)
    def log_before(self, number: float) -> None:
        with pytest.raises(ValueError, match="lies before the open step"):
            self.run.log({"loss": number}, step=self.step.number - 1)

    @rule(number=numbers, force=either)
    def log_scalar(self, number: float, force: bool) -> None:
        self.training.monitor.log_scalar("scalar", number, force=force)
        if force or self.step.is_monitored:
            self.step.scalars.append(number)

    @rule(values=batches, training=mostly, gradients=mostly)
    def forward(self, values: list[int], training: bool, gradients: bool) -> None:
        self.training.forward(values, training=training, gradients=gradients)

    @rule(values=batches, fails=either)
    def be_apart(self, values: list[int], fails: bool) -> None:
        """What is no part of a step."""
        with self.training.monitor.no_monitor():
            self.training.outputs(values, training=True, gradients=True)
        if fails:
            self.training.fail()

    @precondition(lambda self: self.training.passes)
    @rule(place=st.integers(-4, -1), factor=factors)
    def backward(self, place: int, factor: float) -> None:
        self.training.backward(place, factor)

    @rule(clears=either)
    def optimize(self, clears: bool) -> None:
        self.training.optimize(clears=clears)

    @rule()
    def read(self) -> None:
        check_same(recorded(self.run), self.training.history)

    @invariant()
    def agrees(self) -> None:
        assert self.training.monitor.is_monitoring() == self.step.is_monitored
        self.training.check_undisturbed()

    def teardown(self) -> None:
        fails = self.step.number % 3 == 0
        self.training.end(is_ended=fails)
        if fails:
            self.run.fail(KeyError())
        else:
            self.run.finish()
        tmm.remove(self.training.model)
        self.training.check_removed()
        self.recording.check_end(self.training.history)


SHORT = settings(max_examples=30, stateful_step_count=25, deadline=None)
LONG = settings(max_examples=400, stateful_step_count=50, deadline=None)
quiet = pytest.mark.filterwarnings("ignore::tmm.MonitoringWarning")  # of steps without a pass


@quiet
class TestSteps(Steps.TestCase):  # type: ignore[misc, name-defined]
    settings = SHORT


@quiet
class TestRunSteps(RunSteps.TestCase):  # type: ignore[misc, name-defined]
    settings = SHORT


@quiet
@pytest.mark.slow
class TestManySteps(Steps.TestCase):  # type: ignore[misc, name-defined]
    settings = LONG


@quiet
@pytest.mark.slow
class TestManyRunSteps(RunSteps.TestCase):  # type: ignore[misc, name-defined]
    settings = LONG
