"""What a run adds to its steps, and where it keeps them."""

from __future__ import annotations

from functools import partial

import torch

from tmm.core.records import StepRecord
from tmm.runs.delivery import Sinks
from tmm.runs.machine import StepClock, SystemSampler
from tmm.runs.reminder import StepReminder
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.store.null_writer import SilentWriter
from tmm.runtime.store.run_writer import RunWriter
from tmm.steps.archive import WAIT_FOR_DISK
from tmm.steps.ended_step import EndedStep


class RunSteps:
    """Listens to the timeline of a run.

    Attributes:
        clock: measures how long steps take.
        timing: times and rates of the step that is about to end, where somebody has taken them.
    """

    def __init__(
        self,
        writer: RunWriter | SilentWriter,
        sinks: Sinks,
        reminder: StepReminder,
        system: SystemSampler | None,
    ) -> None:
        self.clock = StepClock()
        self.timing: dict[str, float] | None = None
        self._writer = writer
        self._sinks = sinks
        self._reminder = reminder
        self._system = system

    def begins(self) -> None:
        """The user begins a step of the monitor."""
        self._reminder.note_step()

    def completes(self, collector: StepCollector) -> None:
        """Add times, rates and the state of the machine to a step that is to be recorded."""
        values = self.clock.mark() if self.timing is None else self.timing
        self.timing = None
        if self._system is not None:
            values |= self._system.latest()
        for key, value in values.items():
            number = torch.tensor(value, dtype=torch.float64, device="cpu")
            collector.log(key, number, last, of_all_ranks=False)

    def passes(self) -> None:
        """A step has ended that is not recorded: the next one is not taken for both."""
        if self.timing is None:
            self.clock.mark()
        self.timing = None

    def keep(self, ended: EndedStep) -> None:
        """Record what was logged by hand."""
        wait = WAIT_FOR_DISK if ended.is_on_host else 0.0
        self._writer.submit(partial(self.evaluate, ended), wait_seconds=wait)

    def evaluate(self, step: StepCollector | EndedStep) -> StepRecord:
        """Evaluate a step and hand it to the sinks; called by the writer's thread."""
        record = step.record()
        self._sinks.take(record)
        return record


def last(values: torch.Tensor) -> torch.Tensor:
    """The value that was logged last under a key."""
    return values[-1]
