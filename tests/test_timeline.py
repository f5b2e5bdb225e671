"""The timeline of steps, without a model: each value is recorded in the step it belongs to."""

from __future__ import annotations

from typing import TypeAlias

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tmm.runtime.key_binding import KeyRegistry
from tmm.runtime.step_collector import StepCollector
from tmm.steps.ended_step import EndedStep
from tmm.steps.timeline import StepTimeline, checked_step

Values: TypeAlias = dict[str, float]


def log(collector: StepCollector, key: str, number: float) -> None:
    value = torch.tensor(number, dtype=torch.float64)
    collector.log(key, value, lambda values: values[-1], of_all_ranks=False)


class Recorder:
    """Numbers each step that is completed, and keeps what it is told to."""

    def __init__(self) -> None:
        self.recorded: dict[int, Values] = {}
        self.begun = self.completed = self.passed = 0

    def begins(self) -> None:
        self.begun += 1

    def completes(self, collector: StepCollector) -> None:
        self.completed += 1
        log(collector, "completed", self.completed)

    def passes(self) -> None:
        self.passed += 1

    def keep(self, ended: EndedStep) -> None:
        self.recorded[ended.step] = {key: float(v) for key, v in ended.record().by_key().items()}


class Timeline(RuleBasedStateMachine):
    """What the timeline does, beside a plain account of where each value belongs.

    ``values`` are those of the open step, None without one. ``between`` is what was logged outside
    of steps: it belongs to the step ``ended``, and without one to the ``next``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorder = Recorder()
        self.timeline = StepTimeline(KeyRegistry(), 3, self.recorder)
        self.recorded: dict[int, Values] = {}
        self.values: Values | None = None
        self.early: Values = {}
        self.between: Values = {}
        self.ended: tuple[int, Values] | None = None
        self.ended_before: tuple[int, Values] | None = None
        self.next = 3
        self.completed = self.begun = self.passed = 0

    @rule(key=st.sampled_from("ab"), number=st.integers(-9, 9).map(float))
    def log(self, key: str, number: float) -> None:
        log(self.timeline.collector(), key, number)
        (self.between if self.values is None else self.values)[key] = number

    @rule(ahead=st.integers(0, 2), monitored=st.booleans(), of_run=st.booleans())
    def begin(self, ahead: int, monitored: bool, of_run: bool) -> None:
        step = self.timeline.current + ahead
        self.timeline.begin(step, monitored=monitored, is_of_run=of_run)
        self.begun += not of_run
        values = self.values or {}  # of a step that is open, and gives way
        self.early = {}
        if self.between and self.ended is None and step == self.next:
            self.early, self.between = self.between, {}
        self.take_between()
        if self.values is None:
            self.ended_before = self.ended
        self.values = self.early | values if self.values is None else values
        self.ended, self.next, self.monitored = None, step, monitored

    def take_between(self) -> None:
        values, self.between = self.between, {}
        if not values:
            return
        if self.ended is None:
            self.completed += 1
            self.recorded[self.next] = values | {"completed": self.completed}
        else:
            step, known = self.ended
            self.ended = step, known | values
            self.recorded[step] = known | values

    @precondition(lambda self: self.values is not None)
    @rule(fails=st.booleans())
    def end(self, fails: bool) -> None:
        collector, values = self.timeline.open, self.values
        assert collector is not None
        assert values is not None
        collector.failed = fails
        assert self.timeline.end() is collector
        if fails:
            self.passed += 1
            self.dropped(collector.step)
        elif self.monitored or values:
            self.recorder.keep(EndedStep(collector.step, (collector,)))
            self.completed += 1
            self.recorded[collector.step] = values | {"completed": self.completed}
            self.ended = collector.step, self.recorded[collector.step]
        else:
            self.passed += 1
            self.ended = self.known_of(collector.step)
        self.values = None

    def known_of(self, step: int) -> tuple[int, Values]:
        before = self.ended_before
        return before if before is not None and before[0] == step else (step, {})

    def dropped(self, step: int) -> None:
        self.ended = self.known_of(step)
        if self.values:
            self.ended = step, self.ended[1] | self.values
            self.recorded[step] = self.ended[1]
        self.values = None

    @precondition(lambda self: self.values is not None)
    @rule()
    def drop(self) -> None:
        collector = self.timeline.open
        assert collector is not None
        self.timeline.drop(collector)
        self.dropped(collector.step)

    @rule()
    def discard(self) -> None:
        self.timeline.discard()
        if self.values is not None:
            self.values, self.ended, self.between = None, self.ended_before, dict(self.early)
            self.early = {}

    @precondition(lambda self: self.values is None)
    @rule(ahead=st.integers(0, 2))
    def go_to(self, ahead: int) -> None:
        self.timeline.go_to(self.timeline.current + ahead)
        self.take_between()
        self.ended, self.next = None, self.next + ahead

    @rule()
    def flush(self) -> None:
        self.timeline.flush()
        self.take_between()

    @invariant()
    def agrees(self) -> None:
        assert self.recorder.recorded == self.recorded
        counted = self.recorder.completed, self.recorder.begun, self.recorder.passed
        assert counted == (self.completed, self.begun, self.passed)
        assert self.timeline.is_open == (self.values is not None)
        assert self.timeline.current == self.next


class TestTimeline(Timeline.TestCase):  # type: ignore[misc, name-defined]
    settings = settings(max_examples=150, stateful_step_count=30, deadline=None)


def test_without_a_run_a_dropped_step_leaves_nothing() -> None:
    timeline = StepTimeline(KeyRegistry())
    collector = timeline.begin(4, monitored=True)
    log(collector, "loss", 1.0)
    timeline.drop(collector)
    assert not timeline.is_open
    assert timeline.last_recorded is None
    with pytest.raises(RuntimeError, match=r"end_step\(\): no step is open"):
        timeline.require("end_step")


def test_another_monitor_counts_its_own_steps() -> None:
    timeline = StepTimeline(KeyRegistry(), 0, Recorder())
    timeline.begin(7, monitored=True, is_of_run=True)
    assert (timeline.begun, timeline.is_opened_by_run) == (7, True)
    timeline.leave()
    assert (timeline.begun, timeline.is_open, timeline.is_of_run) == (None, False, False)


@pytest.mark.parametrize("step", [True, 1.0, "1", None])
def test_a_step_is_an_integer(step: object) -> None:
    with pytest.raises(TypeError, match="is not an integer"):
        checked_step(step)


def test_a_step_fits_in_64_bits() -> None:
    assert checked_step(2**63 - 1) == 2**63 - 1
    for step in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="does not fit in 64 bits"):
            checked_step(step)
