"""tmm in the ``Trainer`` of Hugging Face transformers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch.optim import Optimizer

from tmm.core.dynamo_private import OptimizedModule
from tmm.core.failures import warn
from tmm.core.replacement import Replacement
from tmm.integrations.session import Session
from tmm.runs.live import LiveRun
from tmm.spec.spec import Spec

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.trainer import Trainer
    from transformers.trainer_callback import (
        EarlyStoppingCallback,
        ExportableState,
        TrainerCallback,
        TrainerControl,
        TrainerState,
    )
    from transformers.training_args import TrainingArguments
except ImportError as error:
    raise ImportError(
        "tmm.integrations.transformers needs transformers and accelerate:"
        " pip install 'tmm-compile[transformers]'"
    ) from error


_CALL_THE_MODEL = (
    "Call the model that training_step and compute_loss are given: self.model may be without what"
    " the trainer has wrapped around it."
)


class TMMCallback(TrainerCallback):
    """Records the trainings of a ``Trainer``: ``Trainer(..., callbacks=[TMMCallback(spec)])``.

    Each ``trainer.train()`` is a run of its own, or goes on with the run of the checkpoint that it
    resumes from. The model is instrumented when the first step begins: by then the trainer has
    wrapped and compiled it. When the training has ended it is as before. A step is an optimizer
    step, numbered by ``state.global_step`` as it begins; what the trainer logs belongs to the step
    that ended last.

    Args:
        spec: what to measure; ``tmm.default_spec()`` without one.
        run: a run of ``tmm.start_run`` to record into, which its owner finishes.
        **options: further arguments of ``tmm.start_run`` for the runs that are started, such as
            ``project`` and ``root``. Without them ``name`` is the ``run_name`` of the arguments,
            and ``config`` the arguments and, as ``model``, the configuration of the model.

    Attributes:
        run: the run of the training, or of the last one; None before the first.

    Raises:
        TypeError: if ``spec`` is no ``tmm.Spec`` or ``run`` no run, or there are ``options`` for a
            run that is given.
    """

    def __init__(
        self, spec: Spec | None = None, run: LiveRun | None = None, **options: Any
    ) -> None:
        Session(spec, run, options)  # raises here what is wrong, where it was written
        self.run = run
        self._arguments = spec, run, options
        self._trainer: Trainer | None = None
        self._session: Session | None = None
        self._has_trained = False
        self._changes = ExitStack()

    # The training

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Let checkpoints keep the run."""
        trainer = _calling_trainer()
        _check_callbacks(trainer)
        _kept_run(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Start a run, or go on with that of the checkpoint."""
        if self._session is not None:
            self._fail(RuntimeError("another training began before this one had ended"))
        trainer = _calling_trainer()
        _check_callbacks(trainer)
        spec, run, options = self._arguments
        if self._has_trained and run is not None and not state.global_step:
            raise ValueError(
                "run= has a training already, whose steps another one would replace; without run="
                " each training is a run of its own"
            )
        if run is None and args.run_name is not None:
            options = {"name": args.run_name, **options}
        session = Session(spec, run, options)
        resume = TMMRun.path_in(state) if state.global_step else None
        session.open(step=state.global_step, resume=resume, config=_configuration(trainer))
        self._trainer, self._session, self.run = trainer, session, session.run
        kept = _kept_run(trainer)
        kept.path = session.state.get("run")
        self._changes.callback(setattr, kept, "path", None)
        # A checkpoint of a training without tmm has no place for it, and saving would fail.
        _kept_states(state)[TMMRun.__name__] = kept.state()
        self._replace(trainer, "_run_epoch", self._run_epoch)
        self._replace(trainer, "evaluation_loop", self._evaluation_loop)
        self._replace(trainer.accelerator, "clip_grad_norm_", self._clip_grad_norm)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Finish the run, or end it as stopped early."""
        assert self._trainer is not None
        self._has_trained = True
        if control.should_training_stop and state.global_step < state.max_steps:
            reason = _why_stopped(self._trainer)
            self._end(lambda run: run.stop_early(reason))
        else:
            self._end()

    # Its steps

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Begin a step."""
        session = self._open_session()
        if not session.is_instrumented:
            self._instrument(session, event["optimizer"])
        session.begin_step(state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """A micro-batch is done, and others follow."""
        self._open_session().end_micro_batch()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """End the step, before ``on_step_end``, where callbacks may run the model."""
        self._open_session().end_step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any
    ) -> None:
        """Record what is logged during the training, the results of evaluations too."""
        if self._session is not None:
            self._session.log(event["logs"])

    # What the trainer has no events for

    def _run_epoch(self, original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        try:
            original(*args, **kwargs)
        except BaseException as error:
            self._fail(error)
            raise

    def _evaluation_loop(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._open_session().paused():  # the step of an accumulation may be open
            return original(*args, **kwargs)

    def _clip_grad_norm(
        self,
        original: Callable[..., Any],
        parameters: Any,
        max_norm: float,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        assert self._trainer is not None
        # Without a limit, the trainer only wants to know the norm.
        if max_norm < math.inf and self._trainer.accelerator.sync_gradients:
            self._open_session().measure_before_clip()
        return original(parameters, max_norm, *args, **kwargs)

    def _replace(self, owner: object, name: str, method: Callable[..., Any]) -> None:
        """Until the training ends, have ``method`` called, with what it replaces."""
        replacement = Replacement(owner, name, partial(method, getattr(owner, name)))
        self._changes.enter_context(replacement)

    def _instrument(self, session: Session, optimizer: Optimizer) -> None:
        assert self._trainer is not None
        model, accelerator = self._trainer.model_wrapped, self._trainer.accelerator
        was_compiled = isinstance(model, OptimizedModule) and model is self._trainer.model
        if was_compiled and accelerator.native_amp:
            raise ValueError(
                "mixed precision around a model that was compiled before cannot be measured; hand"
                " the model itself to the Trainer, with TrainingArguments(torch_compile=True)"
            )
        session.instrument(model)
        session.steps.hint = _CALL_THE_MODEL
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        if session.steps.optimizers.may_watch(optimizer):
            session.watch(optimizer, accelerator.scaler)
        elif session.steps.optimizers.is_asked:
            warn(
                f"gradients, parameters and updates are not measured: {type(optimizer).__name__}"
                " holds no parameter of the model"
            )

    def _open_session(self) -> Session:
        assert self._session is not None, "on_train_begin comes first"
        return self._session

    def _fail(self, error: BaseException) -> None:
        self._end(lambda run: run.fail(error))

    def _end(self, end: Callable[[LiveRun], None] = LiveRun.finish) -> None:
        session, self._session, self._trainer = self._open_session(), None, None
        self._changes.close()
        session.close(end)


class TMMRun(TrainerCallback, ExportableState):
    """Keeps the path of a run in the checkpoints of a trainer; ``TMMCallback`` adds it.

    It is apart from that because a trainer makes such callbacks anew from a checkpoint if it
    restores them, out of what JSON can hold, and a spec is not of that kind.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"args": {"path": self.path}, "attributes": {}}

    @classmethod
    def path_in(cls, state: TrainerState) -> str | None:
        """The path in the state of a checkpoint, if there is one."""
        kept = _kept_states(state).get(cls.__name__, cls().state())
        path: str | None = kept["args"]["path"]
        return path


def _kept_states(state: TrainerState) -> dict[str, Any]:
    """What is kept of callbacks, by the name of their class."""
    states: Any = state.stateful_callbacks  # annotated as the callbacks it is made of
    return states  # type: ignore[no-any-return]


def _check_callbacks(trainer: Trainer) -> None:
    callbacks = trainer.callback_handler.callbacks
    if sum(isinstance(callback, TMMCallback) for callback in callbacks) > 1:
        raise ValueError("a trainer takes one TMMCallback; put all rules into one tmm.Spec")


def _kept_run(trainer: Trainer) -> TMMRun:
    """What keeps the run of a trainer; added to it where it is missing."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TMMRun):
            return callback
    added = TMMRun()
    trainer.add_callback(added)
    return added


def _calling_trainer() -> Trainer:
    """The trainer whose event this is.

    Events tell everything but their trainer; it is always among the callers.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
    raise RuntimeError("TMMCallback is called by no transformers.Trainer, whose model it measures")


def _configuration(trainer: Trainer) -> dict[str, object]:
    configuration: dict[str, object] = trainer.args.to_dict()  # type: ignore[no-untyped-call]
    if isinstance(described := getattr(trainer.model, "config", None), PreTrainedConfig):
        configuration["model"] = described.to_dict()
    return configuration


def _why_stopped(trainer: Trainer) -> str:
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            patience = callback.early_stopping_patience
            if callback.early_stopping_patience_counter >= patience:
                metric = f"eval_{str(trainer.args.metric_for_best_model).removeprefix('eval_')}"
                return f"{metric} did not get better in {patience} evaluations"
    return "the trainer was told to stop"
