"""A model and all that monitors it, put together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tmm.core.failures import Gaps, OnError
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.micro_batches import MicroBatches
from tmm.instrumentation.pass_trace import TraceFolder
from tmm.instrumentation.regions import Region
from tmm.instrumentation.twin import Twin
from tmm.kernels.fused.choose_lowering import Lowering
from tmm.runtime.ranks.protocol import CrossRank
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.store.null_writer import SilentWriter
from tmm.runtime.store.run_writer import RunWriter
from tmm.spec.program_choice import ProgramChoice
from tmm.spec.ranks import Ranks
from tmm.spec.reference import Reference
from tmm.spec.spec import Plan, Spec
from tmm.spec.stages import Stages
from tmm.steps.archive import Evaluate, StepArchive
from tmm.steps.earlier import Earlier
from tmm.steps.forgotten import Forgotten
from tmm.steps.forward_recorder import ForwardRecorder
from tmm.steps.gradient_scale import GradientScale
from tmm.steps.model_steps import ModelSteps
from tmm.steps.monitor import Monitor
from tmm.steps.optimizer_hooks import Watch
from tmm.steps.parameters import ParameterMonitor
from tmm.steps.shared_program import SharedProgram
from tmm.steps.timeline import StepTimeline

if TYPE_CHECKING:
    from tmm.spec.alerts import Alerts


@dataclass(frozen=True)
class Recording:
    """Where the steps of a model are recorded; in memory, without a ``writer``.

    Attributes:
        timeline: that of the run, or one of the model's own.
        earlier: what a run that goes on had recorded before.
        evaluate: turns a step into what is written; called by the writer's thread.
        end: what is left to do when the monitoring is taken off the model; None closes ``writer``.
        finish_run: ends the run, where it is more than the steps of its model.
    """

    timeline: StepTimeline
    writer: RunWriter | SilentWriter | None = None
    earlier: Earlier | None = None
    evaluate: Evaluate = StepCollector.record
    end: Callable[[], None] | None = None
    finish_run: Callable[[], None] | None = None


@dataclass(frozen=True, eq=False)
class MonitoredModel:
    """The ``monitor`` of a model, for its user, and its ``steps``, for who drives them.

    ``finish_run`` ends the run, where that is more than the steps of the model.
    """

    steps: ModelSteps
    monitor: Monitor
    finish_run: Callable[[], None] | None = None

    @staticmethod
    def of(
        root: Region,
        regions: Sequence[Region],
        module: torch.nn.Module,
        plan: Plan,
        recording: Recording,
        *,
        reference: Reference | None,
        trace: TraceFolder | None,
        on_error: OnError,
        place: Ranks,
        programs: ProgramChoice,
        lowering: Lowering,
        ranks: CrossRank | None,
        take_off: Callable[[], None],
        is_bypassed: Callable[[], bool],
        micro_batches: MicroBatches | None = None,
    ) -> MonitoredModel:
        """All that monitors ``module`` as ``plan`` says, and compares it with ``reference``.

        The user calls ``root``; ``regions`` are parts of it that are compiled on their own.
        ``programs`` tells what steps that are not monitored run, ``lowering`` what the compiler is
        to fuse. ``ranks`` joins the steps of all
        processes, of which this one has its ``place``.
        ``take_off`` lets the model run its own program again; ``is_bypassed`` tells whether calls
        of it no longer come here. ``micro_batches`` are those of a pipeline.
        """
        timeline, spec = recording.timeline, plan.spec
        attribution = Attribution(module, plan, timeline.registry, place)
        if isinstance(module, Stages):
            attribution.remarks.update(module.remarks())
        unmeasured = attribution.unmeasured
        gaps = Gaps(on_error)
        forgotten = Forgotten(gaps, unmeasured)
        losses = 1 if micro_batches is None else micro_batches.losses
        scale = GradientScale(place.averaged * losses)
        archive = StepArchive(
            *(timeline, gaps, recording.writer),
            evaluate=recording.evaluate,
            earlier=recording.earlier,
            alerts=_alerts(spec),
            joins_ranks=ranks is not None,
        )
        shared = SharedProgram(module, timeline, gaps, programs)
        recorder = ForwardRecorder(
            *(module, timeline, gaps, forgotten, scale, unmeasured, shared, micro_batches)
        )
        twin = Twin(root, regions, module, attribution, recorder, trace, lowering)
        twin.compare_with(reference)
        parameters = ParameterMonitor(
            *(module, plan, timeline.registry, unmeasured, reference, place, attribution.remarks)
        )
        watch = Watch(
            *(parameters, scale, recorder.collector, recorder.note_failure),
            *(gaps, lambda: twin.has_probes, twin.close),
        )
        steps = ModelSteps(
            *(timeline, gaps, forgotten, recorder, twin, watch, archive),
            ranks=ranks,
            take_off=take_off,
            is_bypassed=is_bypassed,
            end_run=recording.end or archive.close,
        )
        return MonitoredModel(steps, Monitor(steps), recording.finish_run)


def _alerts(spec: Spec) -> Alerts | None:
    """What looks at each step; the detectors are imported where a spec asks for them."""
    if spec.alerts is None:
        return None
    from tmm.spec.alerts import Alerts

    return Alerts(spec.alerts)
