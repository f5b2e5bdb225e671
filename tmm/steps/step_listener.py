"""What the steps of a monitor are told to, besides its own files: a run that has others as well."""

from __future__ import annotations

from typing import Protocol

from tmm.core.records import StepRecord
from tmm.runtime.step_collector import StepCollector


class StepListener(Protocol):
    """A run that records the steps of a monitor, and opens steps of its own between them."""

    def has_opened(self, collector: StepCollector) -> bool:
        """Whether the step was opened by this run rather than by the user of the monitor."""

    def begins(self, collector: StepCollector) -> None:
        """The monitor begins a step."""

    def ends(self, collector: StepCollector) -> None:
        """The monitor is about to end a step."""

    def evaluate(self, step: StepCollector) -> StepRecord:
        """Turn a step into values; called by the writer's thread."""

    def drops(self, collector: StepCollector) -> None:
        """The monitor drops a step, whose logged values are kept."""

    def discards(self) -> None:
        """The monitor forgets its open step: what is logged now belongs to the one before."""

    def detach(self) -> None:
        """The monitor is taken off its model."""
