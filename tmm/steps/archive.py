"""What becomes of the steps that have ended: memory, the files of a run, sinks, alerts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from tmm.core.failures import Gaps
from tmm.core.metrics import FloatArray
from tmm.core.records import StepRecord
from tmm.instrumentation.notes import Notes
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.store.null_writer import SilentWriter
from tmm.runtime.store.run_file import EXPLANATION_NAME
from tmm.runtime.store.run_reader import RunReader
from tmm.runtime.store.run_writer import RunWriter
from tmm.steps.earlier import Earlier, differences
from tmm.steps.timeline import StepTimeline

if TYPE_CHECKING:
    from tmm.spec.alerts import Alerts

Value: TypeAlias = float | FloatArray
Evaluate: TypeAlias = Callable[[StepCollector], StepRecord]

_WAIT_FOR_RANKS = 1.0  # seconds; in the first step, so that the run's file is there for later ones
WAIT_FOR_DISK = 0.05  # seconds; far longer than a write takes on a disk that is well
"""A step on the host waits so long to be written: a process that is killed then loses nothing."""


class StepArchive:
    """Takes steps that have ended; of a run into its files, else into memory.

    Attributes:
        keeps_history: steps stay in memory; those of a run are in its files.
        latest: the step that was kept last; None if the last one was not.
    """

    def __init__(
        self,
        timeline: StepTimeline,
        gaps: Gaps,
        writer: RunWriter | SilentWriter | None = None,
        *,
        evaluate: Evaluate = StepCollector.record,
        earlier: Earlier | None = None,
        alerts: Alerts | None = None,
        joins_ranks: bool = False,
    ) -> None:
        self.keeps_history = writer is None
        self.latest: StepCollector | None = None
        self._timeline = timeline
        self._gaps = gaps
        self._writer = writer
        self._evaluate = evaluate
        self._earlier = earlier
        self._alerts = alerts
        self._joins_ranks = joins_ranks
        self._history: dict[int, StepCollector] = {}
        self._kept = 0
        self._unread: deque[tuple[StepCollector, bool]] = deque()  # those on an accelerator
        self._unseen: deque[StepCollector] = deque()  # by alerts
        if alerts is not None and earlier is not None and writer is not None:
            with RunReader(writer.path) as recorded:
                alerts.recall(recorded)

    @property
    def path(self) -> Path | None:
        """The folder of the run that this process records; None without one."""
        writer = self._writer
        return None if writer is None or isinstance(writer, SilentWriter) else writer.path

    @property
    def is_recorded(self) -> bool:
        """Whether there is a run, which this process or that of rank 0 records."""
        return self._writer is not None

    @property
    def count(self) -> int:
        """How many steps are in the hands of the run, or in memory."""
        return self._kept if self._writer is None else self._writer.submitted

    def prepare(self, step: int, *, is_first: bool) -> None:
        """A step is about to begin, the first one of the monitor or another.

        Raises:
            OSError: if what was measured before could not be written.
        """
        self.latest = None
        if self._writer is None:
            return
        self._writer.raise_pending()
        if not is_first or self._earlier is None or self._writer.submitted:
            return
        # A run that may go on with what was recorded before.
        self._writer.replace_from(step)
        text = self._earlier.goes_back(step)
        if text is not None and self._earlier.is_expected(step):
            self._gaps.add(step, text, "note")
        elif text is not None:
            self._gaps.warn_once("back", step, text)

    def keep(self, finished: StepCollector) -> bool:
        """Hand over a step that has ended; tells whether it could be evaluated.

        Raises:
            ValueError: for a user's aggregate that fails, in the first monitored step.
            OSError: if what was measured before could not be written.
        """
        finished.events = self._gaps.take_events()
        if finished.is_on_host and not self._can_be_evaluated(finished):
            return False
        self.latest = finished
        if self.keeps_history:
            self._history[finished.step] = finished
            self._kept += 1
            self._read_history()
            if not finished.is_on_host:
                self._unread.append((finished, self._gaps.are_raised))
        if self._writer is not None:
            wait = WAIT_FOR_DISK if finished.is_on_host else 0.0
            if self._joins_ranks and not self._gaps.has_recorded:
                wait = _WAIT_FOR_RANKS
            record = partial(self._evaluated, finished, is_raised=self._gaps.are_raised)
            self._writer.submit(record, wait_seconds=wait)
        return True

    def lose(self, finished: StepCollector, reason: str) -> None:
        """A step that has ended is not kept, for a ``reason``."""
        self._timeline.drop(finished)
        self._gaps.give_back(finished.events)
        self._gaps.add(finished.step, reason)

    def look_at(self, finished: StepCollector) -> None:
        """Give alerts of what has begun in a step, which is handed over to the run by now.

        Of one that is on an accelerator still when a later one has ended: nobody waits for it.

        Raises:
            tmm.AlertError: where the spec says so.
        """
        if self._alerts is None:
            return
        self._unseen.append(finished)
        while self._unseen and self._unseen[0].is_copied:
            self._look_at(self._alerts, self._unseen.popleft())

    def _look_at(self, alerts: Alerts, finished: StepCollector) -> None:
        try:
            record = finished.record()
        except Exception:
            if finished.is_on_host:
                raise
            return  # the run, or the history, tells of it
        found = alerts.look_at(record)
        if found:
            if self._writer is not None:
                events = alerts.events(finished.step, found)
                self._writer.submit(StepRecord(finished.step, events=events))
            alerts.act(finished.step, alerts.begun(finished.step, found))

    def all_metrics(self) -> dict[int, dict[str, Value]]:
        """Step to key to value of all steps so far; empty where another process records them."""
        if self._writer is None or isinstance(self._writer, SilentWriter):
            self._read_history(is_waiting=True)
            self._gaps.tell_late_failures()
            return {step: collector.record().by_key() for step, collector in self._history.items()}
        self._writer.flush()
        with RunReader(self._writer.path) as run:
            return {int(step): run.at(int(step)) for step in run.steps}

    def describe(self, measured: dict[str, object]) -> None:
        """Keep in the run what is measured, and say how that differs from what was before."""
        if self._writer is None:
            return
        before = self._writer.describe(measured)
        if before and self._earlier is not None:
            text = (
                f"the run {self._writer.path} goes on with something else than it had recorded:"
                f" {differences(before, measured)}"
            )
            self._gaps.warn_once("differs", self._earlier.last or 0, text)

    def save_explanation(self, explain: Callable[[], str], notes: Notes) -> None:
        """Keep in the run what ``tmm.explain`` says; a failure is one of the ``notes``."""
        if (writer := self._writer) is not None:
            # A full disk raises where what was measured is written.
            write = partial(_write_explanation, writer, explain)
            notes.attempt(EXPLANATION_NAME, write, None)

    def flush(self) -> None:
        """Wait until all that was handed over is written."""
        if self._writer is not None:
            self._writer.flush()

    def finish(self) -> None:
        """Hand over the events that no step has taken, and look at the last steps."""
        while self._alerts is not None and self._unseen:
            self._look_at(self._alerts, self._unseen.popleft())
        if self._writer is not None and (events := self._gaps.take_events()):
            self._writer.submit(StepRecord(events[-1].step, events=events))

    def close(self) -> None:
        """Close the files of the run."""
        if self._writer is not None:
            self._writer.close()

    def _read_history(self, *, is_waiting: bool = False) -> None:
        """Evaluate the steps in memory that are ready: their pinned rows and events are let go."""
        while self._unread and (is_waiting or self._unread[0][0].is_ready):
            finished, is_raised = self._unread.popleft()
            try:
                finished.record()
            except Exception as error:
                if self._history.get(finished.step) is finished:
                    del self._history[finished.step]
                event = self._gaps.add_late_failure(finished.step, error, is_raised=is_raised)
                self._gaps.give_back((*finished.events, event))

    def _can_be_evaluated(self, finished: StepCollector) -> bool:
        """Whether a step can be turned into values; a first one that cannot raises."""
        try:
            finished.record()
        except Exception as error:
            if self._gaps.are_raised:
                raise
            self._timeline.drop(finished)
            self._gaps.give_back(finished.events)
            self._gaps.add_failure(finished.step, error)
            return False
        return True

    def _evaluated(self, finished: StepCollector, *, is_raised: bool) -> StepRecord:
        """What the run keeps of a step; called by the writer's thread.

        Of one that is on an accelerator or on its way to other ranks, it is not known before
        whether it can be evaluated.
        """
        try:
            return self._evaluate(finished)
        except Exception as error:
            gap = self._gaps.add_late_failure(finished.step, error, is_raised=is_raised)
            logged = self._evaluate(finished.logged(is_certain=True))
            return replace(logged, events=(*finished.events, gap))


def _write_explanation(writer: RunWriter | SilentWriter, explain: Callable[[], str]) -> None:
    writer.write_text(EXPLANATION_NAME, explain())
