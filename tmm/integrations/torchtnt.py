"""TorchTNT: a callback that records the trainings of ``train`` and ``fit``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

try:
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.callback import Callback
    from torchtnt.framework.state import EntryPoint, State
except ImportError as error:
    raise ImportError(
        "tmm.integrations.torchtnt needs TorchTNT: pip install 'tmm-compile[torchtnt]'"
    ) from error

from tmm.core.failures import warn
from tmm.integrations.session import Session
from tmm.integrations.torchtnt_training import Outputs, TrackedRun, UnitTraining
from tmm.integrations.torchtnt_unit import name_of_module, scaler_of, steps_done
from tmm.runs.live import LiveRun
from tmm.spec.spec import Spec
from tmm.steps.monitor import Monitor

_SETTINGS = ("precision", "gradient_accumulation_steps", "clip_grad_norm", "clip_grad_value")
_LIMITS = ("max_epochs", "max_steps", "max_steps_per_epoch")


class TMMCallback(Callback):
    """Records what tmm measures of one module of a unit, while ``train`` or ``fit`` trains it.

    Each optimizer step is one step of the run, numbered from 0, whatever the accumulation of
    gradients. What ``train_step`` returns is recorded with it: a scalar, also as the first of a
    tuple, as ``loss``, and the scalars of a mapping by their names. Forward passes of evaluations
    and predictions are not measured; the means of what ``eval_step`` returns are recorded as
    ``eval/...`` in the training step before them.

    Args:
        spec: what to measure; ``tmm.default_spec()`` without one.
        run: a run of ``tmm.start_run`` to record into; its owner finishes it. Without one, each
            training starts a run, or goes on with that of its checkpoint (see ``track``).
        module: name of the unit's attribute that is measured, such as ``"generator"``. By default
            the module that the unit's optimizers train.
        scaler: name of the ``GradScaler`` of that module, where the unit has several.
        **options: further arguments of ``tmm.start_run``, such as ``project`` and ``config``.

    Attributes:
        logger: a ``MetricLogger`` for other callbacks, which records into the run.

    Raises:
        TypeError: if ``spec`` is no ``tmm.Spec``, ``run`` no run, there are ``options`` for a run
            that is given, or they are ``resume`` or ``step``.
    """

    def __init__(
        self,
        spec: Spec | None = None,
        *,
        run: LiveRun | None = None,
        module: str | None = None,
        scaler: str | None = None,
        **options: Any,
    ) -> None:
        self._new_session = partial(Session, spec, run, options)
        self._session = self._new_session()  # so that wrong arguments fail now
        self._given_run = run
        self._module, self._scaler = module, scaler
        self._training: UnitTraining | None = None
        self._paused_phases = 0
        self._results = Outputs()
        self.logger = RunLogger(self.log)

    # What users call

    def track(self, unit: Any) -> None:
        """Let the checkpoints of ``unit`` hold its run; call it before one is restored.

        A training that goes on from a checkpoint then goes on with its run. A training tracks its
        unit by itself when it starts. Before a checkpoint without a run of tmm is restored, do not
        track the unit: that fails with ``Missing key ... app_state.tmm_run``.

        Raises:
            ValueError: if the unit has an attribute of that name already.
        """
        self._tracked(unit)

    @property
    def run(self) -> LiveRun | None:
        """The run of the training, or of the last one; None before, if none was given."""
        return self._session.run

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the training under way."""
        return self._session.monitor

    def log(self, values: Mapping[str, object]) -> None:
        """Record the numbers among ``values`` in the step that is open or has ended last.

        Nothing happens without a run that is open.
        """
        self._session.log(values)

    def measure_before_clip(self) -> None:
        """Measure the gradients as they are now, as ``gradient_before_clip``.

        For a ``train_step`` of your own that clips them; an ``AutoUnit`` does without.
        """
        self._session.measure_before_clip()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure no forward pass in the block, such as one of an ``on_train_step_end``."""
        monitor = self.monitor
        with nullcontext() if monitor is None else monitor.no_monitor():
            yield

    def stop(self, reason: str = "the training was interrupted") -> None:
        """End the training's run and take the monitoring off, as after a ``KeyboardInterrupt``.

        TorchTNT tells callbacks of exceptions, but not of that one. The next training does it, too.
        """
        self._close(lambda run: run.stop_early(reason))

    # Training

    def on_train_start(self, state: State, unit: Any) -> None:
        """Start the run, or go on with it, and instrument the module."""
        self.stop()
        tracked = self._tracked(unit)
        if tracked.training is not None:
            earlier, stop = tracked.training
            if earlier is state:
                raise ValueError(
                    "two TMMCallbacks measure the same module; put all rules into one tmm.Spec"
                )
            stop()
        progress = unit.train_progress
        if progress.num_steps_completed == 0:
            tracked.path, tracked.step = "", 0  # a new training, whatever was before
        elif tracked.step is None:
            every = unit.gradient_accumulation_steps if isinstance(unit, AutoUnit) else 1
            tracked.step = steps_done(progress, every)
        self._start(state, unit, tracked)

    def on_train_get_next_batch_end(self, state: State, unit: Any) -> None:
        """Begin a step, before other callbacks log anything that belongs to it."""
        self._begin_batch(state, unit)

    def on_train_step_start(self, state: State, unit: Any) -> None:
        """Begin a step, where TorchTNT does not have the hook above."""
        self._begin_batch(state, unit)

    def on_train_step_end(self, state: State, unit: Any) -> None:
        """End a step, or a batch of one that accumulates."""
        if self._training is not None and state.train_state is not None:
            self._training.end_batch(state.train_state.step_output)

    def on_train_epoch_end(self, state: State, unit: Any) -> None:
        """Forget the step of a batch that the unit looked for in vain."""
        if self._training is not None:
            self._training.forget_empty_step()

    def on_train_end(self, state: State, unit: Any) -> None:
        """Finish the run, as stopped early if somebody called ``state.stop()``."""
        training = self._training
        if training is not None and training.has_batches and not training.has_trained:
            warn(
                "no optimizer that holds parameters of the instrumented module has stepped, so that"
                " no step was recorded; steps are counted by torch.optim.Optimizer.step"
            )
        if state.should_stop:
            self.stop("state.stop() was called, as by EarlyStopping")
        else:
            self._close()

    def on_exception(self, state: State, unit: Any, exc: BaseException) -> None:
        """Close the run as failed, if it is the training that fails."""
        if state.entry_point in (EntryPoint.TRAIN, EntryPoint.FIT):
            self._close(lambda run: run.fail(exc))
        else:
            self._resume_phase()

    # Evaluation and prediction

    def on_eval_start(self, state: State, unit: Any) -> None:
        """Measure nothing from here on."""
        self._pause_phase()
        self._results = Outputs()

    def on_eval_step_end(self, state: State, unit: Any) -> None:
        """Take the numbers of a batch."""
        output = None if state.eval_state is None else state.eval_state.step_output
        self._results.add(output, may_be_loss=isinstance(unit, AutoUnit))

    def on_eval_end(self, state: State, unit: Any) -> None:
        """Record the means of the evaluation, and measure again."""
        self.log({f"eval/{key}": value for key, value in self._results.take().items()})
        self._resume_phase()

    def on_predict_start(self, state: State, unit: Any) -> None:
        """Measure nothing from here on."""
        self._pause_phase()

    def on_predict_end(self, state: State, unit: Any) -> None:
        """Measure again."""
        self._resume_phase()

    # Parts

    def _tracked(self, unit: Any) -> TrackedRun:
        name = "tmm_run" if self._module is None else f"tmm_run_{self._module}"
        found = getattr(unit, name, None)
        if found is None:
            found = TrackedRun()
            setattr(unit, name, found)
        if not isinstance(found, TrackedRun):
            raise ValueError(f"the unit has an attribute {name!r} already; tmm needs that name")
        return found

    def _start(self, state: State, unit: Any, tracked: TrackedRun) -> None:
        module_name = name_of_module(unit, self._module)
        scaler = scaler_of(unit, self._scaler)
        given, step = self._given_run, tracked.step or 0
        if given is not None and step < given.current_step:
            raise ValueError(
                f"the run {given.id} is at step {given.current_step} already; a training that"
                f" starts at step {step} needs a run of its own"
            )
        self._session = session = self._new_session()
        session.open(step=step, resume=tracked.path or None, config=_settings_of(state, unit))
        tracked.path, tracked.was_loaded = session.state.get("run", ""), False
        module = unit.tracked_modules()[module_name]
        session.instrument(module)
        session.steps.hint = (
            f"The train step called another object than unit.{module_name}; say which one to"
            " measure: TMMCallback(module='name')"
        )
        is_auto_unit = isinstance(unit, AutoUnit)
        self._training = UnitTraining(
            session, unit, module, scaler, tracked, is_auto_unit=is_auto_unit
        )
        tracked.training = state, self.stop
        clips = is_auto_unit and (unit.clip_grad_norm or unit.clip_grad_value)
        if clips and not self._training.measures_before_clip:
            warn("this version of TorchTNT clips where gradients cannot be measured before")

    def _begin_batch(self, state: State, unit: Any) -> None:
        training = self._training
        if training is None:
            return
        tracked = training.tracked
        if tracked.was_loaded:  # a checkpoint was restored in the middle of the training
            if self._given_run is None:
                self._close()
                self._start(state, unit, tracked)
            else:  # it does not go back
                tracked.step = max(tracked.step or 0, self._given_run.current_step + 1)
                tracked.was_loaded = False
        assert self._training is not None
        self._training.begin_batch()

    def _close(self, end: Callable[[LiveRun], None] = LiveRun.finish) -> None:
        training, self._training = self._training, None
        self._paused_phases = 0
        try:
            if training is not None:
                training.tracked.training = None
                training.close()
        finally:
            self._session.close(end)

    def _pause_phase(self) -> None:
        self._paused_phases += 1
        self._session.pause()

    def _resume_phase(self) -> None:
        self._paused_phases = max(0, self._paused_phases - 1)
        if not self._paused_phases:
            self._session.go_on()


class RunLogger:
    """A ``MetricLogger`` of TorchTNT that hands values to ``log``.

    ``step`` counts batches or epochs there, and is not used: values belong to the training step
    that is open or has ended last.
    """

    def __init__(self, log: Callable[[Mapping[str, object]], None]) -> None:
        self._log = log

    def log(self, name: str, data: object, step: int) -> None:
        """Record one number."""
        self._log({name: data})

    def log_dict(self, payload: Mapping[str, object], step: int) -> None:
        """Record several numbers."""
        self._log(payload)

    def close(self) -> None:
        """Nothing: the run is closed with the training."""


def _settings_of(state: State, unit: Any) -> dict[str, object]:
    """The configuration of a run where the user gives none."""
    limits = {name: getattr(state.train_state, name) for name in _LIMITS}
    known = isinstance(unit, AutoUnit)
    settings = {name: getattr(unit, name, None) for name in _SETTINGS} if known else {}
    return {"unit": type(unit).__qualname__, **settings, **limits}
