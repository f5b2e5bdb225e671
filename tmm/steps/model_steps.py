"""The steps of one instrumented model: how they begin, end and are given up."""

from __future__ import annotations

from collections.abc import Callable

from tmm.core.failures import CALL_THE_MODEL, Gaps, words
from tmm.core.inductor_private import pending_backwards_as_before
from tmm.core.rng import unchanged
from tmm.instrumentation.twin import Twin
from tmm.runtime.ranks.protocol import CrossRank
from tmm.runtime.step_collector import StepCollector
from tmm.spec.environment import describe_measured
from tmm.spec.reference import Reference
from tmm.steps.archive import StepArchive
from tmm.steps.explanation import Explanation
from tmm.steps.forgotten import Forgotten
from tmm.steps.forward_recorder import ForwardRecorder
from tmm.steps.notices import Notices
from tmm.steps.open_block import OpenBlock
from tmm.steps.optimizer_hooks import Watch
from tmm.steps.replica_watch import ReplicaWatch
from tmm.steps.step_block import StepBlock
from tmm.steps.timeline import StepTimeline, checked_step

_BEHIND = (
    "such steps are recorded with the rows of this rank alone, marked as partial. Every rank has to"
    " open the same steps; give distributed=False to measure each rank by itself"
)


class ModelSteps:
    """Drives all that happens around a step: of the model, of its optimizers, and of its run.

    ``tmm.monitor(model)`` gives its user's face; a run and the callbacks of frameworks call it
    themselves.

    Attributes:
        hint: tells a user what to call, where nothing measured ran in a step.
        is_closed: nothing is measured any more.
    """

    def __init__(
        self,
        timeline: StepTimeline,
        gaps: Gaps,
        forgotten: Forgotten,
        recorder: ForwardRecorder,
        twin: Twin,
        optimizers: Watch,
        archive: StepArchive,
        *,
        ranks: CrossRank | None = None,
        take_off: Callable[[], None],
        is_bypassed: Callable[[], bool],
        end_run: Callable[[], None],
    ) -> None:
        """``take_off`` lets the model run its own program again; ``end_run`` is called after that.

        ``is_bypassed`` tells whether calls of the model no longer come here.
        """
        self.hint = CALL_THE_MODEL
        self.is_closed = False
        self.timeline = timeline
        self.gaps, self.forgotten = gaps, forgotten
        self.recorder = recorder
        self.twin, self.optimizers, self.archive = twin, optimizers, archive
        self._ranks, self._take_off, self._end_run = ranks, take_off, end_run
        had_gradient, batches = optimizers.parameters.had_gradient, recorder.micro_batches
        self._notices = Notices(twin, gaps, forgotten, had_gradient, is_bypassed, batches)
        self._replicas = ReplicaWatch(twin.module, twin.plan.spec, gaps)
        self._open_block = OpenBlock(recorder, forgotten)
        archive.describe(describe_measured(twin.module, twin.plan.spec))
        self._save_explanation()

    # A step

    def begin_step(self, step: int, *, is_of_run: bool = False) -> bool:
        """Open ``step``, as ``Monitor.begin_step`` says; ``is_of_run`` if its run asks for it."""
        step = checked_step(step)
        if self._open_block.holds(self.timeline.open):
            return self._open_block.begin_nested(step)
        if self.timeline.begun is not None and step < self.timeline.begun:
            raise ValueError(
                f"step={step} lies before the current step {self.timeline.begun}; steps must not"
                " decrease, also from epoch to epoch: step = epoch * len(batches) + batch"
            )
        if self.is_closed:
            return self._begin_in_vain(step)
        self.gaps.tell_late_failures()
        if self.timeline.open is not None:
            self._leave_open_step(step)
        self.archive.prepare(step, is_first=self.forgotten.is_unused)
        monitored = self.twin.plan.spec.is_step_monitored(step)
        self.forgotten.note_begin(monitored=monitored)
        collector = self.timeline.begin(step, monitored=monitored, is_of_run=is_of_run)
        collector.raises_clashes = self.gaps.are_raised
        self.recorder.threads.begin()  # before another thread can take the step for its own
        self.recorder.recording, self.recorder.is_unused = monitored, False
        if monitored:
            self.twin.outside.begin()
        return monitored

    def _leave_open_step(self, step: int) -> None:
        """End or give up the step that is open, as ``step`` begins."""
        if self.timeline.is_opened_by_run:
            self.recorder.settle(is_ended=False)
            assert self.timeline.open is not None
            if self.timeline.open.step == step or not self.timeline.has_content:
                self._forget_step()  # what was logged in it is taken over
            else:
                self.end_step()
            return
        assert self.timeline.open is not None
        if self.timeline.open.monitored:
            self.forgotten.note_not_ended(self.timeline.open.step, step)
        self.drop_step("was not ended")

    def end_step(self) -> None:
        """Close the open step and hand it over, as ``Monitor.end_step`` says."""
        if self._open_block.nested:
            self._open_block.end_nested()
            return
        finished = self.timeline.require("end_step")
        if self.is_closed:
            self._close_step()
            return
        before = self.archive.count
        try:
            self._end_step(finished)
        except BaseException as error:
            if self.archive.count == before:  # it was not handed over
                self._lose_step(finished, f"ended by {words(error)}")
            raise

    def _end_step(self, finished: StepCollector) -> None:
        self.recorder.settle(is_ended=True)
        self.after_micro_batch()
        self.optimizers.end_step(finished)
        if not self.timeline.is_of_run:  # such as the last one, which some ranks may not end
            self._replicas.look(finished)
        self.timeline.end()
        self.twin.rest()
        self._close_step()
        if self._ranks is not None and finished.monitored:
            finished.join_ranks(self._ranks)
            if self._ranks.behind:
                text = f"{self._ranks.behind}: {_BEHIND}"
                self.gaps.warn_once("ranks behind", finished.step, text)
        if finished.failed or not (finished.monitored or finished.holds_values):
            return
        self._notices.before(finished, self.hint)
        if not self.archive.keep(finished):
            return
        self.forgotten.note_record(finished.step)
        is_first = not self.gaps.has_recorded
        if is_first:
            self._save_explanation()  # the graphs are known now
        self.gaps.close()
        self._notices.after(finished, is_first=is_first)
        self.archive.look_at(finished)

    def _lose_step(self, finished: StepCollector, reason: str) -> None:
        """Something has ended ``end_step`` before the step was handed over."""
        if self.timeline.open is finished:
            self.drop_step(reason)
        elif finished.monitored or finished.holds_values:
            self.archive.lose(finished, reason)

    def drop_step(self, reason: str) -> None:
        """Do not record the step that is open, if there is one, and keep the ``reason``."""
        dropped = self.timeline.open
        if dropped is None:
            return
        if dropped.monitored:
            self.gaps.add(dropped.step, reason)
            if self._ranks is not None:
                dropped.failed = True
                dropped.join_ranks(self._ranks)
        self.timeline.drop(dropped)
        self._forget_step()

    def discard_step(self) -> None:
        """Forget the open step, if there is one, as if it had not begun."""
        self.timeline.discard()
        self._forget_step()

    def after_micro_batch(self) -> None:
        """A micro-batch of the open step is done."""
        self.timeline.require("after_micro_batch")
        if self.twin.comparing is not None:
            self.twin.comparing.inputs.forget()

    def compare_replicas(self) -> None:
        """All ranks end the step that their run has opened."""
        if self.timeline.open is not None and not self.is_closed:
            self._replicas.look(self.timeline.open)

    # Blocks

    def enter(self, block: StepBlock) -> bool:
        """Begin the step of a block; called by it."""
        block.is_nested = self._open_block.holds(self.timeline.open)
        monitored = self.begin_step(block.step)
        if not block.is_nested:
            self._open_block.enter(block, self.timeline.open)
        return monitored

    def leave(self, block: StepBlock, error: BaseException | None) -> None:
        """End the step of a block, or drop it because of ``error``; called by it."""
        self._open_block.leave(block)
        if block.is_nested:
            return
        if error is not None:
            self.drop_step(f"ended by {words(error)}")
        elif self.timeline.open is block.collector or not self.timeline.is_opened_by_run:
            self.end_step()  # else run.step() has ended it, and opened the next one

    # The end

    def close(self, *, has_failed: bool = False) -> None:
        """Write what is left, and close the run's files; nothing is measured afterwards.

        ``has_failed`` tells that the training has: it does not wait for other ranks then.
        """
        if self.is_closed:
            return
        self.is_closed, self.recorder.is_unused = True, False
        self._take_off()
        self.drop_step("was not ended")
        self.optimizers.close()
        if self._ranks is not None:
            self._ranks.close(has_failed=has_failed)
        try:
            spec = str(self.twin.plan.spec)
            self.forgotten.note_end(spec, is_recorded=self.archive.is_recorded)
            if self._ranks is not None:
                self.archive.flush()  # what ranks have of their own is known then
            self._save_explanation()
            self.archive.finish()
        finally:
            self._end_run()
            # The steps of the run go on, without this model.
            own = StepTimeline(self.timeline.registry)
            own.begun = self.timeline.begun
            self.recorder.timeline = self.timeline = own
            self.twin.compare_with(None)
        self.gaps.tell_late_failures()

    def _begin_in_vain(self, step: int) -> bool:
        """A step of a monitor that is closed: nothing of it is measured."""
        self.forgotten.note_closed(step)
        self.archive.latest = None
        self.timeline.begin(step, monitored=False)
        return False

    def explanation(self) -> Explanation:
        """What ``tmm.explain`` gives."""
        had_gradient, choice = self.optimizers.parameters.had_gradient, self.recorder.shared.choice
        return Explanation.of(self.twin, choice, self.optimizers.without_rows(), had_gradient)

    def compare_with(self, reference: Reference | None) -> None:
        """Compare with another reference from now on; None for nothing.

        Raises:
            RuntimeError: if a step is open.
        """
        if self.timeline.is_open:
            raise RuntimeError("the reference can be replaced before begin_step or after end_step")
        self.twin.compare_with(reference)
        self.optimizers.parameters.reference = reference

    def compile_ahead(self, *args: object, **kwargs: object) -> None:
        """One forward pass that compiles the monitored program, and leaves no other trace."""
        self.recorder.recording = True  # of the parts, too
        try:
            with unchanged(self.twin.module), pending_backwards_as_before():
                self.twin.repeat(self.twin.root, *args, **kwargs)
        finally:
            self.recorder.recording = False

    def measure_gradients(self, *, before_clip: bool) -> None:
        """``Monitor.monitor_gradients``."""
        if self.recorder.recording:
            collector = self.timeline.require("monitor_gradients")
            self.optimizers.measure_gradients(collector, before_clip=before_clip)

    def _save_explanation(self) -> None:
        self.archive.save_explanation(lambda: str(self.explanation()), self.twin.notes)

    def _forget_step(self) -> None:
        self._close_step()
        self.recorder.forget_passes()
        self.optimizers.drop_step()
        self.twin.rest()

    def _close_step(self) -> None:
        self.recorder.recording = False
        self._open_block.nested.clear()
        self.twin.outside.end()
