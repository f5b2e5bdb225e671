"""Which step is open, which one ended last, and to which of them a logged value belongs."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from tmm.runtime.key_binding import KeyRegistry
from tmm.runtime.step_collector import StepCollector
from tmm.steps.ended_step import EndedStep


class StepListener(Protocol):
    """Whom a timeline tells: a run, which adds values of its own to each step and keeps them."""

    def begins(self) -> None:
        """A step begins that the run did not open itself."""

    def completes(self, collector: StepCollector) -> None:
        """A step is about to be recorded: the last moment to add to it."""

    def passes(self) -> None:
        """A step has ended that is not recorded."""

    def keep(self, ended: EndedStep) -> None:
        """Record values that were logged by hand, with all that is known of their step."""


def checked_step(step: object) -> int:
    """The number of a step.

    Raises:
        TypeError: if it is none.
        ValueError: if it does not fit in 64 bits.
    """
    if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
        raise TypeError(f"step={step!r} is not an integer")
    if not -(2**63) <= step < 2**63:
        raise ValueError(f"step={step} does not fit in 64 bits; count steps from 0")
    return int(step)


class StepTimeline:
    """The steps of a run, of a monitor, or of a monitor in a run, which then share it.

    A step is open from ``begin`` until it is ended, dropped or discarded. A value that is logged
    while one is open belongs to it; one that is logged after that belongs to the step that ended
    last, and before any step to the next one.

    Attributes:
        registry: the keys of the steps.
        open: what gathers the open step; None if there is none.
        begun: the number of the step that began last; None before any.
        current: the number of the open step, or that the next one will have.
        is_of_run: whether the run itself has begun the last step, rather than its user.
        last_recorded: the number of the last step that had values; None before any.
    """

    def __init__(
        self, registry: KeyRegistry, first_step: int = 0, listener: StepListener | None = None
    ) -> None:
        self.registry = registry
        self.open: StepCollector | None = None
        self.begun: int | None = None
        self.current = first_step
        self.is_of_run = False
        self.last_recorded: int | None = None
        self._listener = listener
        self._ended: EndedStep | None = None
        self._ended_before: EndedStep | None = None  # the same when the last step began
        self._between: StepCollector | None = None  # logged while no step was open
        self._early: StepCollector | None = None  # the same, and taken into the open step

    @property
    def is_open(self) -> bool:
        """Whether a step is open, monitored or not."""
        return self.open is not None

    @property
    def has_content(self) -> bool:
        """Whether anything of the open step was measured or logged."""
        return self.open is not None and (self.open.holds_values or self.open.ran_forward)

    def require(self, caller: str) -> StepCollector:
        """What gathers the open step, for a ``caller`` who needs one.

        Raises:
            RuntimeError: if no step is open.
        """
        if self.open is None:
            raise RuntimeError(f"{caller}(): no step is open; call begin_step(step) first")
        return self.open

    @property
    def is_opened_by_run(self) -> bool:
        """Whether a step is open that nobody asked for but the run."""
        return self.is_of_run and self.open is not None

    def begin(self, step: int, *, monitored: bool, is_of_run: bool = False) -> StepCollector:
        """Open a step; what was logged in one that is open still is taken over."""
        if self._listener is not None and not is_of_run:
            self._listener.begins()
        collector = StepCollector(step, self.registry, monitored=monitored)
        self._early = None
        if self._between is not None and self._between.step == step and self._ended is None:
            collector.take_logged(self._between)
            self._early, self._between = self._between, None
        if self._between is not None:
            self.flush()
        if self.open is not None:
            collector.take_logged(self.open)
        else:
            self._ended_before = self._ended
        self._ended = None
        self.open, self.is_of_run = collector, is_of_run
        self.begun = self.current = step
        return collector

    def end(self) -> StepCollector:
        """Close the open step, which is to be recorded unless it has failed."""
        collector = self.open
        assert collector is not None
        if not collector.failed and (collector.monitored or collector.holds_values):
            self._complete(collector)
            collector.end()
            self._ended = EndedStep(collector.step, (collector,))
        else:
            if self._listener is not None:
                self._listener.passes()
            if collector.failed:
                self.drop(collector)
            else:
                self._ended = self._known_of(collector.step)
        self.open = None
        return collector

    def drop(self, collector: StepCollector) -> None:
        """Do not record a step, open or ended; a run keeps what was logged in it by hand."""
        if collector is self.open:
            self.open = None
        self._ended = self._known_of(collector.step)
        if collector.holds_logged and self._listener is not None:
            self._ended = self._ended.with_part(collector.logged())
            self._keep(self._ended)

    def discard(self) -> None:
        """Forget the open step, if there is one, as if it had not begun.

        What is logged now belongs to the one before it; what was logged before it began waits
        again for the step that comes.
        """
        if self.open is not None:
            self.open = None
            self._ended, self._between, self._early = self._ended_before, self._early, None

    def go_to(self, step: int) -> None:
        """No step is open, and the next one is ``step``: what is logged now belongs to that."""
        self.flush()
        self._ended, self.current = None, step

    def leave(self) -> None:
        """The monitor that began the steps is gone: another one counts its own."""
        self.open = self.begun = None
        self.is_of_run = False

    def collector(self) -> StepCollector:
        """What gathers a value that is logged now."""
        if self.open is not None:
            return self.open
        if self._between is None:
            step = self.current if self._ended is None else self._ended.step
            self._between = StepCollector(step, self.registry, monitored=False)
        return self._between

    def flush(self) -> None:
        """Record what was logged while no step was open."""
        collector, self._between = self._between, None
        if collector is None:
            return
        collector.end()
        if self._ended is None:
            self._complete(collector)
            ended = EndedStep(collector.step, (collector,))
        else:
            ended = self._ended.with_part(collector)
        try:
            self._keep(ended)
        except (KeyboardInterrupt, SystemExit):
            self._between = collector  # it is recorded when the run ends
            raise
        self._ended = ended if self._ended is not None else None

    def _complete(self, collector: StepCollector) -> None:
        if self._listener is not None:
            self._listener.completes(collector)
        self.last_recorded = collector.step

    def _keep(self, ended: EndedStep) -> None:
        assert self._listener is not None, "nobody logs between the steps of a monitor without run"
        self.last_recorded = ended.step
        self._listener.keep(ended)

    def _known_of(self, step: int) -> EndedStep:
        """What was recorded of a step before it began for the last time."""
        before = self._ended_before
        return before if before is not None and before.step == step else EndedStep(step)
