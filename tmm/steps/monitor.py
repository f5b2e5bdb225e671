"""The steps of a run: which are monitored, what they measured, where it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch._dynamo.exc import TorchDynamoException
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tmm.core.failures import CALL_THE_MODEL, FAULT_OF_COMPILING, Gaps, OnError, words
from tmm.core.metrics import AGGREGATE_NAMES, Aggregate, FloatArray
from tmm.core.records import StepRecord
from tmm.core.rng import BufferVersions, RandomState, unchanged
from tmm.instrumentation.apart import apart_from_the_program
from tmm.instrumentation.foreign import PASSED_BY, foreign_inputs
from tmm.instrumentation.regions import Region
from tmm.instrumentation.twin import Twin
from tmm.passes.pipeline import PassError
from tmm.runtime.key_binding import Binding, KeyRegistry
from tmm.runtime.ranks.protocol import CrossRank
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.store.null_writer import SilentWriter
from tmm.runtime.store.run_file import EXPLANATION_NAME
from tmm.runtime.store.run_reader import RunReader
from tmm.runtime.store.run_writer import RunWriter
from tmm.spec.alerts import Alerts, alert_events
from tmm.spec.environment import describe_measured
from tmm.spec.ranks import Ranks
from tmm.spec.reference import Reference, load_reference
from tmm.spec.spec import ReferenceSource, Spec, check_reference
from tmm.steps.earlier import Earlier, differences
from tmm.steps.forgotten import Forgotten
from tmm.steps.forward_passes import EVALUATIONS, KEPT_APART, ForwardPasses
from tmm.steps.notices import Notices
from tmm.steps.optimizer_hooks import Watch
from tmm.steps.parameters import ParameterMonitor
from tmm.steps.silent import silent_modules, warning_of
from tmm.steps.step_block import StepBlock
from tmm.steps.step_listener import StepListener

Value: TypeAlias = float | FloatArray
Forward: TypeAlias = Callable[..., Any]

_BEHIND = (
    "such steps are recorded with the rows of this rank alone, marked as partial. Every rank has to"
    " open the same steps; give distributed=False to measure each rank by itself"
)
_NO_ROWS = (
    "the instrumented function ran in the monitored step {step} and called no module that a rule of"
    " activation matches, so that none has rows: give the module that the function calls as module="
)
_BYPASSED = (
    "module.compile() has replaced the call of an instrumented module, so that its output has no"
    " rows: call it before tmm.instrument, not after it"
)
_WAIT_FOR_RANKS = 1.0  # seconds; in the first step, so that the run's file is there for later ones
_WAIT_FOR_DISK = 0.05  # seconds; far longer than a write takes on a disk that is well


class Monitor:
    """Runs the steps of one instrumented model; ``tmm.monitor(model)`` gives it.

    A step is open from ``begin_step`` to ``end_step``; ``with monitor.step(n):`` is both. Forward
    passes in an open, monitored step are measured, and those of the training together make the
    values of the step; see ``ForwardPasses``. Whatever runs outside of a step runs the user's own
    compiled program.

    ``keeps_history`` tells whether the steps stay in memory for ``get_all_metrics``; those of a run
    are in its files. ``keeps_evaluations_apart`` tells whether forward passes of evaluations are
    left out of a step. ``hint`` tells a user what to call, where nothing measured ran in a step.
    """

    def __init__(
        self,
        spec: Spec,
        module: torch.nn.Module,
        registry: KeyRegistry,
        writer: RunWriter | SilentWriter | None = None,
        on_error: OnError = "raise",
        run: StepListener | None = None,
        ranks: CrossRank | None = None,
        earlier: Earlier | None = None,
    ) -> None:
        self.spec = spec
        self.module = module
        self.registry = registry
        self.recording = False
        self.current_step: int | None = None
        self.keeps_history = writer is None
        self.keeps_evaluations_apart = True
        self.hint = CALL_THE_MODEL
        self._writer = writer
        self._run = run
        self._ranks = ranks
        self._earlier = earlier
        self._averaged = 1.0
        self._gaps = Gaps(on_error)
        self._notices = Notices()
        self._passes = ForwardPasses(module)
        self._twin: Twin | None = None
        self._explain: Callable[[], str] | None = None
        self._watch: Watch | None = None
        self._open: StepCollector | None = None
        self._finished: StepCollector | None = None
        self._history: dict[int, StepCollector] = {}
        self._forgotten = Forgotten(self._gaps, lambda: self._require_twin().attribution.unmeasured)
        self._block: StepBlock | None = None
        self.is_unused = True  # no step was opened, and nobody was told so
        self._nested: list[bool] = []  # of each step inside of the block, whether it was recording
        self._take_off: Callable[[], None] = lambda: None
        self._is_bypassed: Callable[[], bool] = lambda: False
        self._is_closed = False
        self._alerts = None if spec.alerts is None else Alerts(spec.alerts)
        if self._alerts is not None and earlier is not None and writer is not None:
            with RunReader(writer.path) as recorded:
                self._alerts.recall(recorded)

    def attach(
        self,
        twin: Twin,
        explain: Callable[[], str],
        reference: Reference | None = None,
        place: Ranks | None = None,
        take_off: Callable[[], None] = lambda: None,
        is_bypassed: Callable[[], bool] = lambda: False,
    ) -> None:
        """Let ``twin`` run the forward passes of monitored steps, and ``explain`` describe them.

        ``reference`` is what they are compared with, ``place`` that of this process among others;
        ``take_off`` lets the model run its own program again; ``is_bypassed`` tells whether calls
        of it no longer come here.
        """
        place = place or Ranks()
        self._take_off, self._is_bypassed = take_off, is_bypassed
        self._averaged = place.averaged
        self._twin, self._explain = twin, explain
        twin.compare_with(reference)
        parameters = ParameterMonitor(
            *(self.module, twin.plan, self.registry, twin.attribution.unmeasured, reference),
            *(place, twin.attribution.remarks),
        )
        self._watch = Watch(parameters, self._open_collector, self.note_failure)
        if self._writer is not None:
            self._describe(self._writer)
        self._save_explanation()

    # Steps

    def is_step_monitored(self, step: int) -> bool:
        """Whether the spec monitors ``step``."""
        return self.spec.is_step_monitored(step)

    def is_monitoring(self) -> bool:
        """Whether a forward pass would be measured now."""
        return self.recording and self._open is not None and not self._open.failed

    def begin_step(self, step: int) -> bool:
        """Open ``step`` and tell whether it is monitored.

        A step that is recorded once more replaces the earlier record. A step that was never
        ended, as after an exception, is dropped and leaves an event in the run. One that begins
        inside of the block ``with monitor.step(n):`` of another one is none: it belongs to that if
        it has its number, else what runs in it is not measured, until its ``end_step``.

        Raises:
            TypeError: if ``step`` is not an integer.
            ValueError: if ``step`` lies before the current one, or does not fit in 64 bits.
            OSError: if what was measured before could not be written.
        """
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
            raise TypeError(f"step={step!r} is not an integer")
        step = int(step)
        if not -(2**63) <= step < 2**63:
            raise ValueError(f"step={step} does not fit in 64 bits; count steps from 0")
        if self._block is not None and self._open is self._block.collector:
            return self._begin_nested(step)
        if self.current_step is not None and step < self.current_step:
            raise ValueError(
                f"step={step} lies before the current step {self.current_step}; steps must not"
                " decrease, also from epoch to epoch: step = epoch * len(batches) + batch"
            )
        if self._is_closed:
            return self._begin_in_vain(step)
        self._gaps.tell_late_failures()
        earlier = None
        if self._open is not None and self._is_opened_by_run():
            self.settle(is_ended=False)
            if self._open.step == step or not self.has_content:
                earlier = self._open
                self._forget_step()
            else:
                self.end_step()
        if self._open is not None:
            if self._open.monitored:
                self._forgotten.note_not_ended(self._open.step, step)
            self._drop_step("was not ended")
        if self._writer is not None:
            self._writer.raise_pending()
            if self._forgotten.is_unused:
                self._begin_to_record(self._writer, step)
        self.is_unused = False
        monitored = self.is_step_monitored(step)
        self._forgotten.note_begin(monitored=monitored)
        self.current_step = step
        self._finished = None
        self._open = StepCollector(step, self.registry, monitored=monitored)
        self._open.raises_clashes = self._gaps.are_raised
        self.recording = monitored
        if monitored:
            self._require_twin().begin_step()
        if earlier is not None:
            self._open.take_logged(earlier)
        if self._run is not None:
            self._run.begins(self._open)
        return monitored

    def end_step(self) -> None:
        """Close the open step and hand what it measured to the run.

        Raises:
            RuntimeError: if no step is open.
            ValueError: for a user's aggregate that fails, in the first monitored step.
            OSError: if what was measured before could not be written.
            tmm.AlertError: for what goes wrong in the step, where the spec says so.
        """
        if self._nested:
            self.recording = self._nested.pop()
            return
        finished = self._require_step("end_step")
        if self._is_closed:
            self._close_step()
            return
        before = self._count_records()
        try:
            self._end_step(finished)
        except BaseException as error:
            if self._count_records() == before:
                self._note_lost(finished, error)
            raise

    def _end_step(self, finished: StepCollector) -> None:
        self.settle(is_ended=True)
        self.after_micro_batch()
        self._require_watch().end_step(finished, self._gaps)
        if self._run is not None:
            self._run.ends(finished)
        self._release_reference()
        self._close_step()
        if self._ranks is not None and finished.monitored:
            finished.join_ranks(self._ranks)
            if self._ranks.behind:
                text = f"{self._ranks.behind}: {_BEHIND}"
                self._gaps.warn_once("ranks behind", finished.step, text)
        if finished.failed or not (finished.monitored or finished.holds_values):
            return
        if finished.ran_forward and self._lacks_activation_gradients(finished):
            self._forgotten.note_no_backward(finished.step)
        if finished.expects_forward and not finished.ran_forward:
            self._gaps.warn_of_missed_forward(finished.step, self.hint)
        elif finished.monitored and self._is_bypassed():
            self._gaps.warn_once("bypassed", finished.step, _BYPASSED)
        self._finished = finished
        finished.events = self._gaps.take_events()
        if finished.is_on_host and not self._can_be_evaluated(finished):
            return
        if self.keeps_history:
            self._history[finished.step] = finished
        if self._writer is not None:
            wait = _WAIT_FOR_DISK if finished.is_on_host else 0.0
            if self._ranks is not None and not self._gaps.has_recorded:
                wait = _WAIT_FOR_RANKS
            record = partial(self._evaluated, finished, is_raised=self._gaps.are_raised)
            self._writer.submit(record, wait_seconds=wait)
        self._forgotten.note_record(finished.step)
        if not self._gaps.has_recorded:
            self._save_explanation()  # the graphs are known now
            if finished.ran_forward:
                self._tell(finished.step, warning_of(silent_modules(self._require_twin())))
                self._look_for_rows(finished)
        self._gaps.close()
        if finished.ran_forward:
            self._tell(finished.step, self._notices.news(self._require_twin()))
        self._look_at(finished)

    def _look_for_rows(self, finished: StepCollector) -> None:
        """Say that a step function has run and nothing of its ``module=`` was measured."""
        twin = self._require_twin()
        is_asked = self.spec.is_strict and self.spec.measures("activation")
        seen = any(map(twin.attribution.how_measured, twin.attribution.names))
        is_known = seen or finished.holds_rows or bool(twin.attribution.unmeasured)
        if twin.root.module is None and is_asked and not is_known:
            self._gaps.warn_once("module", finished.step, _NO_ROWS.format(step=finished.step))

    def _tell(self, step: int, text: str | None) -> None:
        if text is not None:
            self._gaps.tell(step, text)

    def _lacks_activation_gradients(self, finished: StepCollector) -> bool:
        return self.spec.measures("activation_gradient") and not finished.has_activation_gradients

    def _evaluated(self, finished: StepCollector, *, is_raised: bool) -> StepRecord:
        """What the run keeps of a step; called by the writer's thread.

        Of one that is on an accelerator or on its way to other ranks, it is not known before
        whether it can be evaluated.
        """
        evaluate = StepCollector.record if self._run is None else self._run.evaluate
        try:
            return evaluate(finished)
        except Exception as error:
            gap = self._gaps.add_late_failure(finished.step, error, is_raised=is_raised)
            return replace(
                evaluate(finished.logged(is_certain=True)), events=(*finished.events, gap)
            )

    def _count_records(self) -> int:
        """How many steps are in the hands of the run, or in memory."""
        return len(self._history) if self._writer is None else self._writer.submitted

    def _note_lost(self, finished: StepCollector, error: BaseException) -> None:
        """Something ended ``end_step`` before the step was handed over."""
        reason = f"ended by {words(error)}"
        if self._open is finished:
            self._drop_step(reason)
        elif finished.monitored or finished.holds_values:
            if self._run is not None:
                self._run.drops(finished)
            self._gaps.give_back(finished.events)
            self._gaps.add(finished.step, reason)

    def discard_step(self) -> None:
        """Forget the open step, if there is one, as if it had not begun."""
        if self._open is not None and self._run is not None:
            self._run.discards()
        self._forget_step()

    def settle(self, *, is_ended: bool) -> None:
        """Keep the forward passes of evaluations apart, now that the step is about to end.

        ``is_ended`` tells that somebody has said so, or an exception: not where a run finishes.
        """
        collector = self._open
        if collector is None or not collector.monitored or not self.keeps_evaluations_apart:
            return
        verdict = self._passes.settle(opened_by_run=self._is_opened_by_run(), is_ended=is_ended)
        if verdict.apart:
            collector.leave_out(verdict.apart)
        if verdict.apart and not verdict.counts_any:
            collector.ran_forward = collector.expects_forward = False
        if verdict.doubt:
            self._gaps.warn_once(verdict.doubt, collector.step, verdict.doubt)
        if self._passes.count_apart:
            remark = KEPT_APART.format(count=self._passes.count_apart)
            self._require_twin().attribution.unmeasured[EVALUATIONS] = remark

    @property
    def path(self) -> Path | None:
        """The folder of the run that this process records; None without one."""
        writer = self._writer
        return None if writer is None or isinstance(writer, SilentWriter) else writer.path

    @property
    def is_step_open(self) -> bool:
        """Whether a step is open, monitored or not."""
        return self._open is not None

    @property
    def has_content(self) -> bool:
        """Whether anything of the open step was measured or logged."""
        return self._open is not None and (self._open.holds_values or self._open.ran_forward)

    def open_collector(self) -> StepCollector:
        """What gathers the open step.

        Raises:
            RuntimeError: if no step is open.
        """
        return self._require_step("log")

    def step(self, step: int) -> StepBlock:
        """``with monitor.step(n):`` is ``begin_step(n)`` before and ``end_step()`` after the block.

        An exception in the block drops what the step measured; the monitor stays usable.
        """
        block = StepBlock(self, step)
        self._forgotten.note_block(block)
        return block

    def enter(self, block: StepBlock) -> bool:
        """Begin the step of a block; called by it."""
        count = len(self._nested)
        monitored = self.begin_step(block.step)
        block.is_nested = len(self._nested) > count
        if not block.is_nested:
            block.collector, self._block = self._open, block
        return monitored

    def leave(self, block: StepBlock, error: BaseException | None) -> None:
        """End the step of a block, or drop it because of ``error``; called by it."""
        if self._nested:
            self.recording = self._nested.pop() if block.is_nested else self._nested[0]
        if block.is_nested:
            return
        self._block = None
        self._nested.clear()
        if error is not None:
            self._drop_step(f"ended by {words(error)}")
        elif self._open is block.collector or not self._is_opened_by_run():
            self.end_step()  # else run.step() has ended it, and opened the next one

    def _begin_nested(self, step: int) -> bool:
        """A step inside of the block of another one, which goes on."""
        assert self._open is not None
        self._forgotten.note_nested(step, self._open.step)
        self._nested.append(self.recording)
        self.recording = self.recording and step == self._open.step
        return self.recording

    def _begin_in_vain(self, step: int) -> bool:
        """A step of a monitor that is closed: nothing of it is measured."""
        self._forgotten.note_closed(step)
        self.current_step = step
        self._finished = None
        self._open = StepCollector(step, self.registry, monitored=False)
        return False

    def _begin_to_record(self, writer: RunWriter | SilentWriter, step: int) -> None:
        """The first step of a run that may go on with what was recorded before."""
        if self._earlier is None or writer.submitted:
            return
        writer.replace_from(step)
        text = self._earlier.goes_back(step)
        if text is not None and self._earlier.is_expected(step):
            self._gaps.add(step, text, "note")
        elif text is not None:
            self._gaps.warn_once("back", step, text)

    def tell(self, kind: str, step: int, text: str) -> None:
        """Warn, once of a ``kind``, and keep the text in the run and for ``tmm.explain``."""
        self._forgotten.tell(kind, step, text)

    def note_path(self, notice: str) -> None:
        """Say why the run is at another path than was asked for, if it is."""
        if notice:
            self._gaps.warn_once("path", 0, notice)

    def _describe(self, writer: RunWriter | SilentWriter) -> None:
        """Keep in the run what is measured, and say how that differs from what was before."""
        described = describe_measured(self.module, self.spec)
        before = writer.describe(described)
        if before and self._earlier is not None:
            text = (
                f"the run {writer.path} goes on with something else than it had recorded:"
                f" {differences(before, described)}"
            )
            self._gaps.warn_once("differs", self._earlier.last or 0, text)

    def after_micro_batch(self) -> None:
        """Mark the end of a micro-batch. All micro-batches of a step are joined.

        Raises:
            RuntimeError: if no step is open.
        """
        self._require_step("after_micro_batch")
        comparing = self._require_twin().comparing
        if comparing is not None:
            comparing.inputs.forget()

    @contextmanager
    def no_monitor(self) -> Iterator[None]:
        """Do not measure forward passes in the block, such as those of an evaluation."""
        recording, self.recording = self.recording, False
        if self._open is not None:
            self._open.expects_forward = False  # it may be one that is not to be measured
        try:
            yield
        finally:
            self.recording = recording and self._open is not None

    # Values

    def log_scalar(
        self,
        key: str,
        value: float | torch.Tensor,
        aggregate: Aggregate = "mean",
        force: bool = False,
    ) -> None:
        """Record a number under ``key``; several of one step are joined by ``aggregate``.

        A tensor on an accelerator is not waited for. Nothing happens outside of a monitored step;
        ``force=True`` records in any open step.

        Raises:
            ValueError: if ``value`` is not one number, or for a key or aggregate that cannot be.
            TypeError: if ``value`` is no number at all.
        """
        _check_logged("log_scalar", key, aggregate)
        try:
            number = torch.as_tensor(value, dtype=None if torch.is_tensor(value) else torch.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(f"log_scalar({key!r}): {value!r} is not a number") from error
        if number.numel() != 1:
            raise ValueError(
                f"log_scalar({key!r}): the value has shape {tuple(number.shape)}, not one number;"
                " log_tensor joins all elements"
            )
        if self.recording or force:
            self._require_step("log_scalar").log(key, number, aggregate)

    def log_scalars(self, values: Mapping[str, float | torch.Tensor], force: bool = False) -> None:
        """``log_scalar`` for each item."""
        if not isinstance(values, Mapping):
            raise TypeError(f"log_scalars({values!r}): give a dictionary, such as {{'loss': 0.5}}")
        for key, value in values.items():
            self.log_scalar(key, value, force=force)

    def log_tensor(self, key: str, tensor: torch.Tensor, aggregate: Aggregate = "mean") -> None:
        """Record under ``key`` the elements of ``tensor``, joined by ``aggregate``.

        All elements logged under the key in one step are joined. Nothing happens outside of a
        monitored step.

        Raises:
            ValueError: for a key or aggregate that cannot be.
            TypeError: if ``tensor`` is not a tensor.
        """
        _check_logged("log_tensor", key, aggregate)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"log_tensor({key!r}): {tensor!r} is not a tensor; torch.as_tensor(...) makes one"
            )
        if self.recording:
            self._require_step("log_tensor").log(key, tensor, aggregate)

    def get_step_metrics(self) -> dict[str, Value]:
        """Key to value of the step that ended last; empty if it was not monitored.

        Histograms are arrays of shape ``(bins,)``. Waits for an accelerator that is still busy
        with the step.
        """
        return {} if self._finished is None else self._finished.record().by_key()

    def get_all_metrics(self) -> dict[int, dict[str, Value]]:
        """Step to the metrics of that step, of all steps recorded so far (of the whole run).

        Empty in a process whose rows another one records.
        """
        if self._writer is None or isinstance(self._writer, SilentWriter):
            return {step: collector.record().by_key() for step, collector in self._history.items()}
        self._writer.flush()
        with RunReader(self._writer.path) as run:
            return {int(step): run.at(int(step)) for step in run.steps}

    # Reference

    def set_reference(self, reference: ReferenceSource) -> None:
        """Compare with another reference from now on; ``"init"`` is the model as it is now.

        Graphs are traced anew.

        Raises:
            RuntimeError: if a step is open.
            ValueError: if it does not fit the model.
            TypeError: if it is no reference.
            OSError: if a file cannot be read.
        """
        check_reference(reference)
        self._replace_reference(load_reference(self.module, self._require_twin().plan, reference))

    def remove_reference(self) -> None:
        """Compare with nothing from now on, and give up the reference's memory.

        Raises:
            RuntimeError: if a step is open.
        """
        self._replace_reference(None)

    def give_reference_inputs(self, *args: Any, **kwargs: Any) -> None:
        """Compare the model's next forward pass with one of the reference on these inputs.

        They are matched with the model's by the names of its arguments; without this call they are
        the same. Tensors that differ in shape or dtype are refused by that forward pass.

        Raises:
            RuntimeError: if there is no reference.
        """
        comparing = self._require_twin().comparing
        if comparing is None:
            raise RuntimeError("give_reference_inputs(): there is no reference; set_reference(...)")
        comparing.inputs.give(args, kwargs)

    def _replace_reference(self, reference: Reference | None) -> None:
        if self._open is not None:
            raise RuntimeError("the reference can be replaced before begin_step or after end_step")
        self._require_twin().compare_with(reference)
        self._require_watch().parameters.reference = reference

    # Parameters

    @property
    def watches_optimizers(self) -> bool:
        """Whether the spec measures what only an optimizer's steps tell."""
        return any(rule.subject == "parameters" for rule in self.spec.rules)

    def parameters_without_rows(self) -> dict[str, str]:
        """Which parameters a rule matches that had no rows so far, with the reason.

        By the family of the rule, as in ``"gradient of 0.weight"``. Nothing before the first
        monitored step.
        """
        return self._require_watch().without_rows()

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` holds parameters of the model."""
        return self._require_watch().holds(optimizer)

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` holds parameters of the model and is not watched yet."""
        return self._require_watch().may_watch(optimizer)

    def expect_scaler(self, scaler: GradScaler) -> None:
        """Take the factor of ``scaler`` out of gradients, before an optimizer is known."""
        self._require_watch().expect(scaler)

    def watch(self, optimizer: object, scaler: GradScaler | None = None) -> None:
        """Measure gradients, updates and optimizer state around each step of ``optimizer``.

        Gradients are those that the optimizer sees, after accumulation, clipping and unscaling;
        with a closure, those of its last evaluation. A step of an optimizer inside of another one's
        is part of it, whichever of them is watched. Of a wrapper that calls no hooks, what it wraps
        is watched. Parameters are measured when a monitored step ends. With ``scaler``, a step that
        it skips is recorded as ``step/skipped``, its gradients are left out, and its scale is
        recorded as ``step/grad_scale``.

        Raises:
            TypeError: if ``optimizer`` is not an optimizer and keeps none, or ``scaler`` not a
                ``GradScaler``.
            ValueError: if it holds none of the model's parameters or is watched already, or for a
                second scaler where activation gradients are measured.
            RuntimeError: if ``scaler`` comes after a monitored step of activation gradients,
                whose graphs do without it.
        """
        if self._is_closed:
            self._forgotten.note_closed(self.current_step or 0)
            return
        known = ("parameters", "activation_gradient")
        if scaler is None and not any(
            rule.subject in known or rule.family in known for rule in self.spec.rules
        ):
            self._forgotten.note_watched_in_vain(self.current_step or 0, str(self.spec))
        self.watch_found(optimizer, scaler)

    def watch_found(
        self, optimizer: object, scaler: GradScaler | None = None, *, finds_all: bool = False
    ) -> None:
        """``watch`` for an optimizer that is found, whatever the spec measures.

        ``finds_all`` tells that each optimizer that steps is found.
        """
        self._require_watch().finds_optimizers |= finds_all
        is_new = scaler is not None and not self._require_watch().knows(scaler)
        if is_new and self._twin is not None and self._twin.has_probes:
            raise RuntimeError(
                "watch(scaler=...): call it before the first monitored step; the graphs that"
                " measure activation gradients are compiled already, without the scale"
            )
        self._require_watch().add(optimizer, scaler)

    def monitor_parameters(self) -> None:
        """Measure the parameters now instead of at the end of the step.

        Nothing happens outside of a monitored step.

        Raises:
            RuntimeError: for a second call in one step.
        """
        if self.recording:
            collector = self._require_step("monitor_parameters")
            if collector.has_parameters:
                raise RuntimeError("monitor_parameters() was called already in this step")
            collector.has_parameters = True
            self._require_watch().parameters.add_parameters(collector)

    def monitor_gradients(self, before_clip: bool = False) -> None:
        """Measure the gradients now, as ``gradient_before_clip`` if they are yet to be clipped.

        Watched optimizers do so by themselves before their steps, but for ``before_clip``. The
        factor of a watched scaler is taken out. Nothing happens outside of a monitored step.

        Raises:
            RuntimeError: for a second call in one step, which would count them twice.
        """
        if self.recording:
            collector = self._require_step("monitor_gradients")
            self._require_watch().measure_gradients(collector, before_clip=before_clip)
            lacks_all = all(parameter.grad is None for parameter in self.module.parameters())
            if lacks_all and self.spec.measures("gradient") and not collector.has_watched_gradients:
                text = (
                    f"monitor_gradients() found no gradient in step {collector.step}, so that rules"
                    " of gradient have no rows of it: call it after loss.backward() and before"
                    " optimizer.zero_grad()"
                )
                self._gaps.warn_once("no gradients", collector.step, text)

    @property
    def twin(self) -> Twin:
        """The program that runs in monitored steps."""
        return self._require_twin()

    @property
    def parameters(self) -> ParameterMonitor:
        """What measures parameters, gradients and updates."""
        return self._require_watch().parameters

    @property
    def has_run_forward(self) -> bool:
        """Whether a forward pass of the step that is open was measured."""
        return self._open is not None and self._open.ran_forward

    # Forward passes

    def note_unused_pass(self) -> None:
        """A forward pass of the model begins, and no step was opened so far."""
        if torch.is_grad_enabled() and self.module.training and not self.recording:
            self.is_unused = not self._forgotten.note_pass()

    def add(self, binding: Binding, outputs: Sequence[torch.Tensor]) -> None:
        """Take the extra outputs of one call of a graph."""
        if self._open is not None and self.recording:
            source = self._passes.current
            if source is not None:
                source.has_rows = True
            self._open.add(binding, outputs, source=source)

    def note_failure(self, error: Exception) -> None:
        """Something of the open step could not be measured: the step is dropped, with a warning.

        Raises ``error`` until a first step has succeeded (unless ``on_error="warn"``).
        """
        if self._gaps.are_raised:
            raise error
        if self._open is not None and not self._open.failed:
            self._open.failed = True
            self._gaps.add_failure(self._open.step, error)

    def gradient_sink(self) -> Callable[[Binding, Sequence[torch.Tensor]], None] | None:
        """Takes rows of gradients of the forward passes of this step, as long as it is open."""
        collector, source = self._open_collector(), self._passes.current
        if collector is None:
            return None

        def take(binding: Binding, outputs: Sequence[torch.Tensor]) -> None:
            if self._open is collector:
                collector.has_activation_gradients = True
                collector.add(binding, outputs, unless=collector.was_skipped, source=source)

        return take

    def begin_pass(self, module: torch.nn.Module | None, inputs: object) -> None:
        """A step function calls a module, which is a forward pass of its own."""
        if self._passes.current is not None:
            self._passes.begin(module, inputs)

    def end_pass(self, output: object) -> None:
        """What ``begin_pass`` told of has given ``output``."""
        if self._passes.current is not None:
            self._passes.end(output)

    @contextmanager
    def outside_pass(self, module: torch.nn.Module, output: object) -> Iterator[None]:
        """Rows in the block are of a module that was called past the model's own forward."""
        if self._open is not None:
            self._open.ran_forward = True
        if self._passes.current is not None or not self.keeps_evaluations_apart:
            yield
            return
        with self._passes.running(module, ()):
            yield
            self._passes.end(output)

    def follow(self, outputs: Sequence[object]) -> None:
        """A graph of a step function has given ``outputs``."""
        if self._passes.current is not None:
            self._passes.follow([o for o in outputs if isinstance(o, torch.Tensor)])

    @property
    def scales_gradients(self) -> bool:
        """Whether a scaler is watched, or ranks average their gradients."""
        return self._require_watch().has_scaler or self._averaged != 1.0

    def gradient_factor(self, device: torch.device) -> torch.Tensor | None:
        """What makes gradients those of the loss of the whole batch; None for 1."""
        factor = self._require_watch().gradient_factor(device)
        if self._averaged == 1.0:
            return factor
        if factor is None:
            factor = torch.ones((), dtype=torch.float64, device=device)
        return factor / self._averaged

    def run_forward(self, region: Region, plain: Forward, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass of a monitored step; the user's own program, if it is an evaluation.

        One on tensors that hold no numbers runs the user's program, unmeasured. A fault of the
        monitoring is raised until a first step has succeeded (unless ``on_error="warn"``). After
        that the user's own program runs in its place, from the same random state, and the step is
        dropped with a warning and an event in the run.
        """
        collector, passes, module = self._open, self._passes, region.module
        assert collector is not None
        with apart_from_the_program():
            foreign = foreign_inputs(args, kwargs)
        if foreign is not None:
            self.pass_by(foreign)
            with self.no_monitor():  # nor the modules that it calls
                return plain(*args, **kwargs)
        if not self.keeps_evaluations_apart:
            return self._run_forward(collector, region, plain, args, kwargs)
        if passes.is_surely_evaluation(module, opened_by_run=self._is_opened_by_run()):
            with self.no_monitor():  # nor the parts that are compiled on their own
                return plain(*args, **kwargs)
        with passes.running(module, (args, kwargs)):
            output = self._run_forward(collector, region, plain, args, kwargs)
            passes.end(output)
            return output

    def _run_forward(
        self,
        collector: StepCollector,
        region: Region,
        plain: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        twin = self._require_twin()
        collector.ran_forward = True
        if self._gaps.are_certain:
            collector.failed = True
            return plain(*args, **kwargs)
        if twin.untraced is not None:
            output, fault = twin.watch(twin.untraced, region, *args, **kwargs)
            if fault is not None and self._gaps.are_raised:
                raise fault
            if fault is not None:
                collector.failed = True
                self._gaps.add_failure(collector.step, fault)
            return output
        if self._gaps.are_raised:
            try:
                return twin.run(region, *args, **kwargs)
            except (TorchDynamoException, PassError) as error:
                error.add_note(FAULT_OF_COMPILING)
                raise
        random_state, buffers = RandomState.capture(), BufferVersions.capture(self.module)
        try:
            return twin.run(region, *args, **kwargs)
        except Exception as error:
            if buffers.changed():
                raise  # a forward pass that has begun to write cannot be repeated
            random_state.restore()
            with self.no_monitor():
                output = plain(*args, **kwargs)  # an error of the model itself is raised here
            collector.failed = True
            self._gaps.add_failure(collector.step, error)
            return output

    @property
    def is_bearing(self) -> bool:
        """Whether a fault of the monitoring may cost the open step its rows, but not end it."""
        return self._open is not None and not self._gaps.are_raised

    def bear(self, error: Exception) -> None:
        """Do not record the open step, for which ``error`` is the reason."""
        if self._open is not None and not self._open.failed:
            self._open.failed = True
            self._gaps.add_failure(self._open.step, error)

    def pass_by(self, foreign: str) -> None:
        """Say, once, that a pass which is ``foreign`` (``torch.export``, say) is not measured."""
        assert self._open is not None
        self._open.expects_forward = False  # that none was measured is said here
        unmeasured = self._require_twin().attribution.unmeasured
        name = f"[root module], under {foreign}"
        if name not in unmeasured:
            unmeasured[name] = PASSED_BY
            self._gaps.warn_of_foreign_pass(self._open.step, foreign)

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Compile the monitored program for these arguments of the model, ahead of its first step.

        Runs one forward pass and leaves random state and buffers as they were; nothing is
        recorded.

        Raises:
            RuntimeError: if a step is open, or the model is a step function, which could change
                more than that.
        """
        if self._open is not None:
            raise RuntimeError("prepare(): call it before begin_step, or after end_step")
        assert self._twin is not None
        if self._twin.root.module is None:
            raise RuntimeError("prepare(): a step function would train; its first step compiles")
        self.recording = True  # of the parts, too
        try:
            with unchanged(self.module):
                self._twin.repeat(self._twin.root, *args, **kwargs)
        finally:
            self.recording = False

    def close(self) -> None:
        """Write what is left, and close the run's files; the monitor cannot record afterwards."""
        if self._is_closed:
            return
        self._is_closed, self.is_unused = True, False
        self._take_off()
        if self._open is not None:
            self._drop_step("was not ended")
        self._require_watch().close()
        if self._ranks is not None:
            self._ranks.close()
        try:
            self._forgotten.note_end(str(self.spec), is_recorded=self._writer is not None)
            if self._writer is not None:
                if self._ranks is not None:
                    self._writer.flush()  # what ranks have of their own is known then
                self._save_explanation()
                if events := self._gaps.take_events():
                    self._writer.submit(StepRecord(events[-1].step, events=events))
        finally:
            if self._run is not None:
                self._run.detach()
            elif self._writer is not None:
                self._writer.close()
            twin = self._require_twin()
            twin.compare_with(None)
        self._gaps.tell_late_failures()

    def _open_collector(self) -> StepCollector | None:
        return self._open if self.is_monitoring() else None

    def _is_opened_by_run(self) -> bool:
        """Whether the open step is one that nobody asked for but ``run.step`` and the like."""
        return self._run is not None and self._open is not None and self._run.has_opened(self._open)

    def _release_reference(self) -> None:
        self._require_twin().rest()
        if self._twin is not None and self._twin.comparing is not None:
            self._twin.comparing.reference.release()

    def _require_twin(self) -> Twin:
        assert self._twin is not None
        return self._twin

    def _require_watch(self) -> Watch:
        assert self._watch is not None
        return self._watch

    def _look_at(self, finished: StepCollector) -> None:
        """Give alerts of what has begun in a step, which is handed over to the run by now."""
        if self._alerts is None:
            return
        found = self._alerts.look_at(finished.record())
        if found:
            if self._writer is not None:
                events = alert_events(finished.step, found)
                self._writer.submit(StepRecord(finished.step, events=events))
            self._alerts.act(finished.step, found)

    def _can_be_evaluated(self, finished: StepCollector) -> bool:
        """Whether a step can be turned into values; a first one that cannot raises."""
        try:
            finished.record()
        except Exception as error:
            if self._gaps.are_raised:
                raise
            self._finished = None
            if self._run is not None:
                self._run.drops(finished)
            self._gaps.give_back(finished.events)
            self._gaps.add_failure(finished.step, error)
            return False
        return True

    def _save_explanation(self) -> None:
        if self._writer is None or self._explain is None:
            return
        writer, explain = self._writer, self._explain
        notes = self._require_twin().notes  # a full disk raises where what was measured is written

        def write() -> None:
            writer.write_text(EXPLANATION_NAME, explain())

        notes.attempt(EXPLANATION_NAME, write, None)

    def _drop_step(self, reason: str) -> None:
        if self._open is not None:
            if self._run is not None:
                self._run.drops(self._open)
            if self._open.monitored:
                self._gaps.add(self._open.step, reason)
                if self._ranks is not None:
                    self._open.failed = True
                    self._open.join_ranks(self._ranks)
            self._forget_step()

    def _forget_step(self) -> None:
        self._close_step()
        self._passes.forget()
        self._require_watch().drop_step()
        self._release_reference()

    def _close_step(self) -> None:
        self._open, self.recording = None, False
        self._nested.clear()
        self._require_twin().end_step()

    def _require_step(self, caller: str) -> StepCollector:
        if self._open is None:
            raise RuntimeError(f"{caller}(): no step is open; call begin_step(step) first")
        return self._open


def _check_logged(caller: str, key: object, aggregate: object) -> None:
    """Raise ``ValueError`` for a key or an aggregate under which nothing can be logged."""
    if not isinstance(key, str) or not key:
        raise ValueError(f"{caller}: the key {key!r} is not text")
    if not callable(aggregate) and aggregate not in AGGREGATE_NAMES:
        raise ValueError(
            f"{caller}({key!r}): aggregate={aggregate!r} is neither callable nor one of"
            f" {', '.join(AGGREGATE_NAMES)}"
        )
