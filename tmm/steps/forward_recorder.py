"""The forward passes of the step that is open: which program runs them, and where rows go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch

from tmm.core.dynamo_private import TorchDynamoException
from tmm.core.failures import FAULT_OF_COMPILING, Gaps
from tmm.instrumentation.apart import apart_from_the_program
from tmm.instrumentation.foreign import PASSED_BY, foreign_inputs
from tmm.instrumentation.micro_batches import MicroBatches
from tmm.instrumentation.recorder import GradientSink
from tmm.instrumentation.regions import Region
from tmm.instrumentation.twin import Twin
from tmm.passes.pipeline import PassError
from tmm.runtime.key_binding import Binding
from tmm.runtime.step_collector import StepCollector
from tmm.steps.ends_of_model import between_ends
from tmm.steps.forgotten import Forgotten
from tmm.steps.forward_passes import EVALUATIONS, KEPT_APART, ForwardPasses
from tmm.steps.gradient_scale import GradientScale
from tmm.steps.shared_program import SharedProgram
from tmm.steps.step_threads import StepThreads
from tmm.steps.timeline import StepTimeline
from tmm.steps.unrecorded import unrecorded

Forward: TypeAlias = Callable[..., Any]


class ForwardRecorder:
    """Runs forward passes of monitored steps, and takes what graphs and eager calls measure.

    Attributes:
        timeline: whose open step it is, and ``registry`` the keys of its steps.
        recording: a monitored step is open, and nobody has said that what runs now is none of it.
        is_unused: no step was opened so far, and nobody was told so.
        shared: runs passes of the training that are not monitored, where it is to.
        keeps_evaluations_apart: forward passes of evaluations are left out of a step.
        threads: tells passes of other threads.
        micro_batches: tells which passes of a pipeline's stages count; None without a pipeline.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        timeline: StepTimeline,
        gaps: Gaps,
        forgotten: Forgotten,
        scale: GradientScale,
        unmeasured: dict[str, str],
        shared: SharedProgram,
        micro_batches: MicroBatches | None = None,
    ) -> None:
        self.recording = False
        self.micro_batches = micro_batches
        self.is_unused = True
        self.shared = shared
        self.keeps_evaluations_apart = True
        self.timeline = timeline
        self.registry = timeline.registry
        self._module = module
        self._gaps = gaps
        self._forgotten = forgotten
        self._scale = scale
        self._unmeasured = unmeasured
        self._passes = ForwardPasses(module)
        self.threads = StepThreads(timeline, gaps, unmeasured)

    def is_elsewhere(self) -> bool:
        """Whether another thread than this one has the step; what this one runs is none of it."""
        return self.threads.pass_by(trains=self.recording and self._module.training)

    def is_monitoring(self) -> bool:
        """Whether a forward pass would be measured now."""
        collector = self.timeline.open
        return self.recording and collector is not None and not collector.failed

    @property
    def is_expected(self) -> bool:
        """Whether a forward pass that begins now is one of the program, not of its machinery."""
        return self.micro_batches is None or self.micro_batches.is_running

    def collector(self) -> StepCollector | None:
        """What gathers the step that is measured now."""
        return self.timeline.open if self.is_monitoring() else None

    def note_unused_pass(self) -> None:
        """A forward pass of the model begins, and no step was opened so far."""
        if torch.is_grad_enabled() and self._module.training and not self.recording:
            self.is_unused = not self._forgotten.note_pass()

    def no_monitor(self) -> AbstractContextManager[None]:
        """Do not measure forward passes in the block."""
        return unrecorded(self)

    # Rows

    def add(self, binding: Binding, outputs: Sequence[torch.Tensor]) -> None:
        """Take the extra outputs of one call of a graph."""
        collector = self.timeline.open
        if collector is not None and self.recording:
            source = self._passes.current
            if source is not None:
                source.has_rows = True
            collector.add(binding, outputs, source=source)

    def gradient_sink(self) -> GradientSink | None:
        """Takes rows of gradients of the forward passes of this step, as long as it is open."""
        collector, source = self.collector(), self._passes.current
        if collector is None:
            return None

        def take(binding: Binding, outputs: Sequence[torch.Tensor]) -> None:
            batches = self.micro_batches
            if batches is not None and batches.repeats_backward:
                return
            if self.timeline.open is collector:
                collector.has_activation_gradients = True
                collector.add(binding, outputs, unless=collector.was_skipped, source=source)

        return take

    @property
    def scales_gradients(self) -> bool:
        """Whether a scaler is watched, or ranks average their gradients."""
        return self._scale.is_scaled

    def gradient_factor(self, device: torch.device) -> torch.Tensor | None:
        """What makes gradients those of the loss of the whole batch; None for 1."""
        return self._scale.factor(device)

    # Passes

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
        if self.timeline.open is not None:
            self.timeline.open.ran_forward = True
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

    def settle(self, *, is_ended: bool) -> None:
        """Keep the forward passes of evaluations apart, now that the step is about to end.

        ``is_ended`` tells that somebody has said so, or an exception: not where a run finishes.
        """
        collector = self.timeline.open
        if collector is None or not collector.monitored or not self.keeps_evaluations_apart:
            return
        by_run = self.timeline.is_opened_by_run
        verdict = self._passes.settle(opened_by_run=by_run, is_ended=is_ended)
        if verdict.apart:
            collector.leave_out(verdict.apart)
        if verdict.apart and not verdict.counts_any:
            collector.ran_forward = collector.expects_forward = False
        if verdict.doubt:
            self._gaps.warn_once(verdict.doubt, collector.step, verdict.doubt)
        if self._passes.count_apart:
            remark = KEPT_APART.format(count=self._passes.count_apart)
            self._unmeasured[EVALUATIONS] = remark

    def forget_passes(self) -> None:
        """The open step is given up, and its forward passes with it."""
        self._passes.forget()

    def run_forward(
        self, twin: Twin, region: Region, plain: Forward, *args: Any, **kwargs: Any
    ) -> Any:
        """Run a forward pass of a monitored step; the user's own program, if it is an evaluation.

        One on tensors that hold no numbers runs the user's program, unmeasured. A fault of the
        monitoring is raised until a first step has succeeded (unless ``on_error="warn"``). After
        that the user's own program runs in its place, from the same random state, and the step is
        dropped with a warning and an event in the run.
        """
        collector, passes, module = self.timeline.open, self._passes, region.module
        assert collector is not None
        with apart_from_the_program():
            foreign = foreign_inputs(args, kwargs)
        if foreign is not None:
            self.pass_by(foreign)
            with self.no_monitor():  # nor the modules that it calls
                return plain(*args, **kwargs)
        run = partial(self._run_forward, collector, twin, region, plain, args, kwargs)
        if not self.keeps_evaluations_apart:
            return between_ends(run, twin, region, args, kwargs, self._measure)
        if passes.is_surely_evaluation(module, opened_by_run=self.timeline.is_opened_by_run):
            with self.no_monitor():  # nor the parts that are compiled on their own
                return plain(*args, **kwargs)
        with passes.running(module, (args, kwargs)) as begun:
            if self.micro_batches is not None and self.micro_batches.is_trained:
                begun.will_train()
            output = between_ends(run, twin, region, args, kwargs, self._measure)
            passes.end(output)
            return output

    def _measure(self, measure: Callable[..., None], *arguments: Any) -> None:
        try:
            with apart_from_the_program(), torch.no_grad():
                measure(*arguments, self.add)
        except Exception as error:  # the program goes on
            self.note_failure(error)

    def _run_forward(
        self,
        collector: StepCollector,
        twin: Twin,
        region: Region,
        plain: Forward,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        collector.ran_forward = True
        if self._gaps.are_certain:
            collector.failed = True
            return plain(*args, **kwargs)
        if twin.untraced is not None:
            output, fault = twin.watch(twin.untraced, region, *args, **kwargs)
            if fault is not None:
                self.note_failure(fault)
            return output
        if self._gaps.are_raised:
            try:
                return twin.run(region, *args, **kwargs)
            except (TorchDynamoException, PassError) as error:
                error.add_note(FAULT_OF_COMPILING)
                raise
        is_function, is_whole = region.module is None, twin.is_whole
        before = self.shared.states.capture(
            trains=is_function, of_torch_only=is_whole, looks=not is_whole
        )
        try:
            return twin.run(region, *args, **kwargs)
        except Exception as error:
            if before.is_written_to():
                raise
            before.random.restore()
            with self.no_monitor():
                output = plain(*args, **kwargs)  # an error of the model itself is raised here
            self.note_failure(error)
            return output

    # Faults

    @property
    def is_bearing(self) -> bool:
        """Whether a fault of the monitoring may cost the open step its rows, but not end it."""
        return self.timeline.open is not None and not self._gaps.are_raised

    def bear(self, error: Exception) -> None:
        """Do not record the open step, for which ``error`` is the reason."""
        collector = self.timeline.open
        if collector is not None and collector.monitored and not collector.failed:
            collector.failed = True
            self._gaps.add_failure(collector.step, error)

    def note_failure(self, error: Exception) -> None:
        """Something of the open step could not be measured: the step is dropped, with a warning.

        Raises ``error`` until a first step has succeeded (unless ``on_error="warn"``), but where
        measuring has lacked memory: the program itself may have enough.
        """
        if self._gaps.are_raised and not isinstance(error, torch.OutOfMemoryError):
            raise error
        self.bear(error)

    def pass_by(self, foreign: str) -> None:
        """Say, once, that a pass which is ``foreign`` (``torch.export``, say) is not measured."""
        collector = self.timeline.open
        assert collector is not None
        collector.expects_forward = False  # that none was measured is said here
        name = f"[root module], under {foreign}"
        if name not in self._unmeasured:
            self._unmeasured[name] = PASSED_BY
            self._gaps.warn_of_foreign_pass(collector.step, foreign)
