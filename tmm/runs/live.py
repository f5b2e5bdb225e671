"""A run that this process records."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tmm.core.failures import UserLine, warn, words
from tmm.core.metrics import HISTOGRAM_EDGES
from tmm.core.records import Event, StepRecord
from tmm.runs.artifacts import write_samples
from tmm.runs.delivery import NamedSink, RunInfo, Sinks
from tmm.runs.find_optimizer import OptimizerFinder
from tmm.runs.held import HeldFolder
from tmm.runs.logged_numbers import checked_count, numbers_in
from tmm.runs.machine import SystemSampler
from tmm.runs.reminder import StepReminder
from tmm.runs.run_steps import RunSteps, last
from tmm.runs.state import Lock, Status
from tmm.runtime.key_binding import KeyRegistry
from tmm.runtime.store.null_writer import SilentWriter
from tmm.runtime.store.run_reader import RunReader
from tmm.runtime.store.run_writer import RunWriter
from tmm.spec.default import default_spec
from tmm.spec.environment import describe_environment
from tmm.spec.spec import Spec
from tmm.steps.earlier import Earlier
from tmm.steps.model_steps import ModelSteps
from tmm.steps.monitor import Monitor
from tmm.steps.monitored_model import MonitoredModel, Recording
from tmm.steps.timeline import StepTimeline, checked_step

if TYPE_CHECKING:
    from tmm.analysis.story import Story

Model = TypeVar("Model")


class LiveRun:
    """A run while it is recorded; ``tmm.start_run`` makes one.

    ``log`` adds values to the step that is open, and ``step`` ends it and opens the next one. With
    a model that ``tmm.instrument(..., run=run)`` instruments, the steps are those of its monitor,
    and what is logged between two of them belongs to the one that has ended. As a context manager
    it finishes by itself, as "failed" for an exception.

    Where several processes train together, that of rank 0 records; in the others a run takes
    everything and keeps nothing.

    Attributes:
        id: unique among all runs; the name of its folder ``path``.
        project, name, config, tags, notes: as given.
    """

    def __init__(
        self,
        run: RunInfo,
        *,
        system_seconds: float | None,
        sinks: tuple[NamedSink, ...],
        lock: Lock | None,
        earlier: Earlier | None = None,
    ) -> None:
        """``lock`` is held on the run's folder; None for a process that keeps nothing.

        ``earlier`` is what a run that goes on had recorded before.
        """
        self._earlier = earlier
        self.path, self.id = run.path, run.id
        self.project, self.name = run.project, run.name
        self.config, self.tags, self.notes = dict(run.config), run.tags, run.notes
        info = {
            "id": self.id,
            "project": self.project,
            "name": self.name,
            "config": self.config,
            "tags": list(self.tags),
            "notes": self.notes,
            **describe_environment(),
        }
        # What is open at exit is recorded first, then the writer ends: handlers run last in, first
        # out, and the writer registers its own when it starts.
        self.writer: RunWriter | SilentWriter = SilentWriter(run.path)
        self._held = HeldFolder(run.path, lock)
        self._is_finished = False
        self._changing = threading.RLock()  # of steps, as other threads may log meanwhile
        if lock is not None:
            try:
                self.writer = RunWriter(
                    run.path,
                    info=info,
                    histogram_edges=HISTOGRAM_EDGES,
                    replaces_from=run.first_step if run.repeats_steps else None,
                    started=self._register_exit,
                    ended=self._held.recording_failed,
                )
                self._held.begin()
            except BaseException:
                lock.release()
                raise
        # Before the handler below, which runs first then: what backends do at exit ends them.
        self._sinks = Sinks(sinks, run)
        self._begun_at = UserLine.here()
        self._reminder = StepReminder(self._tell)
        self._system = None if system_seconds is None else SystemSampler(system_seconds)
        self._recorded = RunSteps(self.writer, self._sinks, self._reminder, self._system)
        self._timeline = StepTimeline(KeyRegistry(), run.first_step, self._recorded)
        self._monitored: MonitoredModel | None = None
        self._finder: OptimizerFinder | None = None
        if self._system is not None:
            self._system.start()
        self._register_exit()

    @property
    def monitor(self) -> Monitor | None:
        """That of the model that is watched; None without one."""
        return None if self._monitored is None else self._monitored.monitor

    @property
    def _steps(self) -> ModelSteps | None:
        return None if self._monitored is None else self._monitored.steps

    @property
    def current_step(self) -> int:
        """The step that is open, or that will be."""
        return self._timeline.current

    # Values

    def log(self, values: Mapping[str, object], step: int | None = None) -> None:
        """Record numbers under their keys in the open step; the last one of a key counts.

        Mappings inside are flattened, ``{"train": {"loss": 1.0}}`` to ``train/loss``. Tensors on an
        accelerator are not waited for.

        Args:
            values: numbers, tensors of one element on any device, or numpy numbers, by key.
            step: the step they belong to; the open one ends if it is an earlier one.

        Raises:
            TypeError: for what is no number.
            ValueError: for an array of several, an empty key, or a ``step`` that lies before.
            RuntimeError: after ``finish``.
            OSError: if what was logged before could not be written.
        """
        self._require_open()
        numbers = dict(numbers_in(values))
        with self._changing:
            if step is not None:
                self._go_to(step)
            collector = self._timeline.collector()
            for key, number in numbers.items():
                collector.log(key, number, last, of_all_ranks=False)
                self._reminder.note_logged(collector.step, key, collector.times_logged(key))

    def step(self, *, samples: int | None = None, tokens: int | None = None) -> int:
        """End the open step and give the number of the next one.

        ``samples`` and ``tokens`` are how many it has processed, for their rates.

        Raises:
            TypeError, ValueError: if they are no numbers, or negative.
            RuntimeError: after ``finish``, or outside of the monitor's steps, where it has them.
            OSError: if what was logged before could not be written.
        """
        self._require_open()
        counts = checked_count("samples", samples), checked_count("tokens", tokens)
        with self._changing:
            if self._steps is not None:
                self._timeline.require("run.step")
            self._reminder.note_step()
            self._recorded.timing = self._recorded.clock.mark(*counts)
            self._advance(self.current_step + 1)
            return self.current_step

    def log_samples(self, step: int, samples: Mapping[str, object]) -> None:
        """Keep small arrays or texts of a step; ``tmm.open_run(path).samples(step)`` reads them.

        Raises:
            ValueError: for a name that is no text, or more than 16 MiB of a step.
            TypeError: for what is neither text nor an array of numbers, or a step that is none.
            OSError: if they cannot be written.
        """
        self._require_open()
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
            raise TypeError(f"log_samples: step={step!r} is not an integer")
        if step < 0:
            raise ValueError(f"log_samples: step={step} is negative")
        if not isinstance(samples, Mapping):
            raise TypeError(f"log_samples({step}, {samples!r}): give a dictionary, by name")
        if not self.is_recorded:
            return
        self.writer.raise_pending()
        write_samples(self.path, int(step), samples)

    def findings(self) -> tuple[Story, ...]:
        """What went wrong so far, as ``Run.findings`` gives it; nothing where another rank records.

        Waits until what was recorded is written.
        """
        if not self.is_recorded:
            return ()
        if not self.is_finished:
            self.writer.flush()
        from tmm.analysis.story import find_stories

        with RunReader(self.path) as recorded:
            return find_stories(recorded)

    # Models

    def watch(
        self,
        model: Model,
        spec: Spec | None = None,
        *,
        optimizer: Optimizer | None = None,
        scaler: GradScaler | None = None,
        **options: Any,
    ) -> Model:
        """Instrument ``model`` to be recorded in the steps of this run; gives the same object back.

        Args:
            model: as in ``tmm.instrument``.
            spec: what to measure; ``tmm.default_spec()`` without one.
            optimizer: what trains it. Without one, an optimizer that steps and holds parameters of
                the model is found by itself.
            scaler: the ``GradScaler`` that goes with it.
            **options: further arguments of ``tmm.instrument``.

        Raises:
            RuntimeError: after ``finish``, or for a second model.
            ValueError, TypeError, OSError: as ``tmm.instrument`` and ``Monitor.watch`` raise.
        """
        from tmm.runs.instrument import instrument, remove, steps_of

        self._require_open()
        watched = instrument(model, spec or default_spec(), run=self, **options)
        steps = steps_of(watched)
        try:
            if optimizer is not None:
                steps.optimizers.watch(optimizer, scaler)
            elif steps.optimizers.is_asked:
                self._finder = OptimizerFinder(steps, scaler)
        except BaseException:
            remove(watched)
            raise
        self._begin_watched(steps)
        self._reminder.count_updates(steps.optimizers.holds, lambda: self.current_step)
        return watched

    def recording_of(self, registry: KeyRegistry) -> Recording:
        """How this run records a model that ``attach`` will be called with; keys are its.

        Raises:
            RuntimeError: after ``finish``, or for a second model.
        """
        self._require_open()
        if self._monitored is not None:
            raise RuntimeError(
                f"the run {self.id} watches a model already; start another run, or put both models"
                " into one module"
            )
        self._timeline.registry = registry  # a key has one owner, wherever it is logged
        return Recording(
            *(self._timeline, self.writer, self._earlier, self._recorded.evaluate),
            *(self._detach, self.finish),
        )

    def attach(self, monitored: MonitoredModel) -> None:
        """Record the steps of a model; called by ``tmm.instrument``."""
        self._monitored = monitored

    def _detach(self) -> None:
        """The monitoring is taken off the model."""
        self._monitored = None
        if self._finder is not None:
            self._finder.stop()  # what it found is of that model
        self._timeline.leave()

    # End

    def finish(self) -> None:
        """Record what is open and close the run as finished; a second call does nothing."""
        self._end("finished", "")

    def stop_early(self, reason: str) -> None:
        """Close the run as stopped early, such as by a validation loss that no longer falls."""
        self._end("stopped", reason)

    def fail(self, error: BaseException) -> None:
        """Close the run as failed."""
        self._end("failed", words(error))

    @property
    def is_recorded(self) -> bool:
        """Whether this process keeps what it takes, rather than another rank."""
        return self._held.is_recorded

    @property
    def is_finished(self) -> bool:
        """Whether the run was closed."""
        return self._is_finished

    def __enter__(self) -> LiveRun:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.finish()
        else:
            self.fail(error)

    def _end(self, status: Status, reason: str) -> None:
        if self.is_finished or self._held.process != os.getpid():
            return
        atexit.unregister(self._finish_at_exit)
        failure: BaseException | None = None
        try:
            try:
                if status != "failed":
                    self._reminder.note_end(self.current_step)
            finally:
                with self._changing:
                    self._close(is_ended=status == "failed")  # by what failed, in a step
        except BaseException as error:
            failure = error
        lost = failure or self.writer.failure
        if lost is not None and status != "failed":
            status, reason = "failed", words(lost)
        self._is_finished = True
        try:
            self._sinks.close(status)
        finally:
            try:
                self._held.end(status, reason, self._timeline.last_recorded)
            except OSError as error:
                failure = failure or error
        if failure is not None:
            raise failure

    def _register_exit(self) -> None:
        atexit.unregister(self._finish_at_exit)
        atexit.register(self._finish_at_exit)

    def _finish_at_exit(self) -> None:
        error = self._held.uncaught()
        if error is None:
            self.finish()
        else:
            self.fail(error)

    def _tell(self, step: int, text: str) -> None:
        """Say what was forgotten, and keep it in the run."""
        if self._steps is not None:
            self._steps.forgotten.tell("run.step", step, text)
            return
        warn(text, self._begun_at)
        self.writer.submit(StepRecord(step, events=(Event(step, "gap", text),)))

    def _close(self, *, is_ended: bool) -> None:
        self._reminder.stop()
        if self._finder is not None:
            self._finder.stop()
        if self._system is not None:
            self._system.stop()
        try:
            if self._steps is not None:
                if self._timeline.is_of_run:
                    self._end_step(is_ended=is_ended)
                self._steps.close(has_failed=is_ended)
            self._timeline.flush()
        finally:
            self.writer.close()

    # Steps

    def _go_to(self, step: int) -> None:
        step = checked_step(step)
        if step < self.current_step:
            raise ValueError(f"step={step} lies before the open step {self.current_step}")
        if step > self.current_step:
            if self._steps is not None and not self._timeline.is_of_run:
                raise RuntimeError(
                    f"step={step} is not the step {self.current_step} that the monitor has open;"
                    " leave out step="
                )
            self._reminder.note_step()
            self._advance(step)

    def _advance(self, step: int) -> None:
        """End the step that is open, and let ``step`` be the next one."""
        if self._steps is not None:
            self._end_step(is_ended=True)
        self._timeline.go_to(step)
        if self._steps is not None:
            self._begin_watched(self._steps)

    def _begin_watched(self, steps: ModelSteps) -> None:
        steps.begin_step(self.current_step, is_of_run=True)

    def _end_step(self, *, is_ended: bool) -> None:
        assert self._steps is not None
        self._steps.recorder.settle(is_ended=is_ended)
        if is_ended and self._timeline.is_of_run:
            self._steps.compare_replicas()
        if self._steps.timeline.has_content:
            self._steps.end_step()
        else:
            self._steps.discard_step()

    def _require_open(self) -> None:
        if self.is_finished:
            raise RuntimeError(f"the run {self.id} is {self._held.status}; start another one")
        if self._held.process != os.getpid():
            raise RuntimeError(
                f"the run {self.id} belongs to process {self._held.process}: a child forked from"
                " it cannot record into it"
            )
