"""A run that this process records."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tmm.core.failures import UserLine, warn, words
from tmm.core.metrics import HISTOGRAM_EDGES
from tmm.core.records import Event, StepRecord
from tmm.runs.artifacts import write_samples
from tmm.runs.delivery import NamedSink, RunInfo, Sinks
from tmm.runs.ended_step import EndedStep
from tmm.runs.find_optimizer import OptimizerFinder
from tmm.runs.held import HeldFolder
from tmm.runs.logged_numbers import checked_count, numbers_in
from tmm.runs.machine import StepClock, SystemSampler
from tmm.runs.reminder import StepReminder
from tmm.runs.state import Lock, Status
from tmm.runtime.key_binding import KeyRegistry
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.store.null_writer import SilentWriter
from tmm.runtime.store.run_writer import RunWriter
from tmm.spec.default import default_spec
from tmm.spec.environment import describe_environment
from tmm.spec.spec import Spec
from tmm.steps.earlier import Earlier

if TYPE_CHECKING:
    from tmm.steps.monitor import Monitor

Model = TypeVar("Model", bound=Callable[..., Any])

_WAIT = 0.05  # seconds


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
        monitor: that of the model that is watched; None without one.
        current_step: the step that is open, or that will be.
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
        self.earlier = earlier
        self.path, self.id = run.path, run.id
        self.project, self.name = run.project, run.name
        self.config, self.tags, self.notes = dict(run.config), run.tags, run.notes
        self.monitor: Monitor | None = None
        self.current_step = run.first_step
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
        self._registry = KeyRegistry()
        self._open: StepCollector | None = None
        self._opened: StepCollector | None = None
        self._ended: EndedStep | None = None  # the last step of the monitor
        self._ended_before: EndedStep | None = None  # the same when it began the open one
        self._early: StepCollector | None = None  # logged before that, and taken into it
        self._last_step: int | None = None
        self._finder: OptimizerFinder | None = None
        self._clock = StepClock()
        self._timing: dict[str, float] | None = None
        self._reminder = StepReminder(self._tell)
        self._begun_at = UserLine.here()
        self._begins_own = False  # the step that the monitor begins is one of this run
        self._system = None if system_seconds is None else SystemSampler(system_seconds)
        if self._system is not None:
            self._system.start()
        self._register_exit()

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
        if step is not None:
            self._go_to(step)
        collector = self._collector()
        for key, number in numbers.items():
            collector.log(key, number, _last, of_all_ranks=False)
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
        if self.monitor is not None:
            self.monitor.open_collector()
        self._reminder.note_step()
        self._timing = self._clock.mark(*counts)
        self._end_step(is_ended=True)
        self.current_step += 1
        if self.monitor is not None:
            self._begin_monitored()
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
        from tmm.runs.instrument import instrument, remove
        from tmm.runs.instrument import monitor as monitor_of

        self._require_open()
        watched = instrument(model, spec or default_spec(), run=self, **options)
        monitor = monitor_of(watched)
        try:
            if optimizer is not None:
                monitor.watch_found(optimizer, scaler)
            elif monitor.watches_optimizers:
                self._finder = OptimizerFinder(monitor, scaler)
        except BaseException:
            remove(watched)
            raise
        self._begin_monitored()
        self._reminder.count_updates(monitor.holds, lambda: self.current_step)
        return watched

    def attach(self, monitor: Monitor) -> None:
        """Record the steps of ``monitor``; called by ``tmm.instrument``.

        Raises:
            RuntimeError: after ``finish``, or for a second model.
        """
        self._require_open()
        if self.monitor is not None:
            raise RuntimeError(
                f"the run {self.id} watches a model already; start another run, or put both models"
                " into one module"
            )
        self.monitor = monitor
        self._registry = monitor.registry  # a key has one owner, wherever it is logged

    def has_opened(self, collector: StepCollector) -> bool:
        """Whether the step of the monitor was opened by this run; called by the monitor."""
        return collector is self._opened

    def begins(self, collector: StepCollector) -> None:
        """The monitor begins a step; called by it."""
        step, self._opened, self._early = collector.step, None, None
        if not self._begins_own:
            self._reminder.note_step()
        if self._open is not None and self._open.step == step and self._ended is None:
            collector.take_logged(self._open)
            self._early, self._open = self._open, None
        self._flush_own()
        self._ended_before, self._ended = self._ended, None
        self.current_step = step

    def evaluate(self, step: StepCollector | EndedStep) -> StepRecord:
        """Evaluate a step and hand it to the sinks; called by the writer's thread."""
        record = step.record()
        self._sinks.take(record)
        return record

    def ends(self, collector: StepCollector) -> None:
        """The monitor is about to end a step; called by it."""
        if collector.failed:
            self._timing = None
            self._clock.mark()
            self.drops(collector)
            return
        self._ended = self._known_of(collector.step)
        if collector.monitored or collector.holds_values:
            self._add_own_values(collector)
            self._last_step = collector.step
            self._ended = EndedStep(collector.step, (collector,))
        elif self._timing is None:
            self._clock.mark()  # so that the next step is not taken for both

    def discards(self) -> None:
        """The monitor forgets its open step: what is logged now belongs to the one before.

        What was logged before it began waits again for the step that comes.
        """
        self._ended, self._open, self._early = self._ended_before, self._early, None

    def drops(self, collector: StepCollector) -> None:
        """The monitor drops a step, whose logged values are kept; called by it."""
        self._ended = self._known_of(collector.step)
        if collector.holds_logged:
            self._ended = self._ended.with_part(collector.logged())
            self._submit(self._ended)

    def detach(self) -> None:
        """The monitor is taken off its model; called by it."""
        self.monitor = self._opened = None

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
                self._held.end(status, reason, self._last_step)
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
        if self.monitor is not None:
            self.monitor.tell("run.step", step, text)
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
            if self.monitor is not None:
                if self._opened is not None:
                    self._end_step(is_ended=is_ended)
                self.monitor.close()
            self._flush_own()
        finally:
            self.writer.close()

    # Steps

    def _collector(self) -> StepCollector:
        if self.monitor is not None and self.monitor.is_step_open:
            return self.monitor.open_collector()
        if self._open is None:
            step = self.current_step if self._ended is None else self._ended.step
            self._open = StepCollector(step, self._registry, monitored=False)
        return self._open

    def _go_to(self, step: int) -> None:
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
            raise TypeError(f"step={step!r} is not an integer")
        if step >= 2**63:
            raise ValueError(f"step={step} does not fit in 64 bits; count steps from 0")
        if step < self.current_step:
            raise ValueError(f"step={step} lies before the open step {self.current_step}")
        if step > self.current_step:
            if self.monitor is not None and self._opened is None:
                raise RuntimeError(
                    f"step={step} is not the step {self.current_step} that the monitor has open;"
                    " leave out step="
                )
            self._reminder.note_step()
            self._end_step(is_ended=True)
            self.current_step = int(step)
            if self.monitor is not None:
                self._begin_monitored()

    def _begin_monitored(self) -> None:
        assert self.monitor is not None
        self._begins_own = True
        try:
            self.monitor.begin_step(self.current_step)
        finally:
            self._begins_own = False
        self._opened = self.monitor.open_collector()

    def _end_step(self, *, is_ended: bool) -> None:
        if self.monitor is not None:
            self.monitor.settle(is_ended=is_ended)
        if self.monitor is None:
            self._flush_own()
        elif self.monitor.has_content:
            self.monitor.end_step()
        else:
            self.monitor.discard_step()
        self._opened = None

    def _flush_own(self) -> None:
        collector, self._open = self._open, None
        if collector is None:
            return
        if self._ended is None:
            self._add_own_values(collector)
            ended = EndedStep(collector.step, (collector,))
        else:
            ended = self._ended.with_part(collector)
        try:
            self._submit(ended)
        except (KeyboardInterrupt, SystemExit):
            self._open = collector  # it is recorded when the run ends
            raise
        self._ended = ended if self._ended is not None else None

    def _submit(self, ended: EndedStep) -> None:
        self._last_step = ended.step
        # As in ``Monitor.end_step``: a process that is killed now is to lose nothing.
        wait = _WAIT if ended.is_on_host else 0.0
        self.writer.submit(partial(self.evaluate, ended), wait_seconds=wait)

    def _known_of(self, step: int) -> EndedStep:
        """What was recorded of a step before it began for the last time."""
        before = self._ended_before
        return before if before is not None and before.step == step else EndedStep(step)

    def _add_own_values(self, collector: StepCollector) -> None:
        values = self._clock.mark() if self._timing is None else self._timing
        self._timing = None
        if self._system is not None:
            values |= self._system.latest()
        for key, value in values.items():
            number = torch.tensor(value, dtype=torch.float64)
            collector.log(key, number, _last, of_all_ranks=False)

    def _require_open(self) -> None:
        if self.is_finished:
            raise RuntimeError(f"the run {self.id} is {self._held.status}; start another one")
        if self._held.process != os.getpid():
            raise RuntimeError(
                f"the run {self.id} belongs to process {self._held.process}: a child forked from"
                " it cannot record into it"
            )


def _last(values: torch.Tensor) -> torch.Tensor:
    return values[-1]
