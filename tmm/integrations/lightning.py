"""Lightning: a callback that records the trainings of ``Trainer.fit``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

try:
    import lightning.pytorch as pl
except ImportError:
    try:
        import pytorch_lightning as pl  # type: ignore[no-redef]
    except ImportError as error:
        raise ImportError(
            "tmm.integrations.lightning needs Lightning: pip install 'tmm-compile[lightning]'"
        ) from error

from tmm.core.failures import warn
from tmm.core.replacement import Replacement, Substitutes
from tmm.instrumentation.regions import COMPILED_CALL, region_of
from tmm.integrations.lightning_trainer import (
    begins_window,
    clips,
    configuration,
    has_reached_its_end,
    is_of_lightning,
    learning_rates,
    parts,
    why_stopped,
)
from tmm.integrations.session import Session
from tmm.runs.live import LiveRun
from tmm.spec.spec import Spec


class TMMCallback(pl.Callback):
    """Records what tmm measures of a ``LightningModule`` while ``Trainer.fit`` trains it.

    What is measured is the ``training_step``, compiled in any way or not at all. Each optimizer
    step is one step of the run, numbered by ``trainer.global_step`` before it, whatever the
    accumulation of gradients. Validation, tests and predictions are not measured. What the module
    logs for loggers is recorded in each step, results of a validation in the training step before
    it; so are ``loss`` (the mean of what ``training_step`` returned in the step), ``epoch`` and the
    learning rates, named as by ``LearningRateMonitor``.

    Checkpoints keep which run it is; ``trainer.fit(..., ckpt_path=...)`` goes on with it, and so
    does another ``fit`` of the same trainer that goes on counting.

    Args:
        spec: what to measure; ``tmm.default_spec()`` without one.
        run: a run of ``tmm.start_run`` to record into, which its owner finishes. Without one, each
            training starts a run, with the hyperparameters of the module as its configuration.
        **options: further arguments of ``tmm.start_run``, such as ``project`` and ``name``.

    Raises:
        TypeError: if ``spec`` is no ``tmm.Spec``, ``run`` no run, or there are ``options`` for a
            run that is given.
    """

    def __init__(
        self, spec: Spec | None = None, *, run: LiveRun | None = None, **options: Any
    ) -> None:
        Session(spec, run, options)  # it says what is wrong with them
        self._arguments = spec, run, options
        self._session: Session | None = None
        self._trainer: pl.Trainer | None = None
        self._resume: str | None = None
        self._methods = Substitutes()  # of the module, during a batch
        self._switches = Substitutes()  # of its parts, while they are measured
        self._is_inside = False
        self._step = 0  # as trainer.global_step was when the step began
        self._losses: list[torch.Tensor] = []
        self._logged: dict[str, torch.Tensor] = {}

    @property
    def run(self) -> LiveRun | None:
        """The run of the training under way, or of the last one; None before the first."""
        return None if self._session is None else self._session.run

    # Checkpoints

    @property
    def state_key(self) -> str:
        """Where checkpoints keep the state: under ``checkpoint["callbacks"]``."""
        return f"{__name__}.{type(self).__qualname__}"

    def state_dict(self) -> dict[str, Any]:
        """Where the run is; nothing before there is one."""
        return {} if self._session is None else dict(self._session.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the run of a checkpoint in the training that begins."""
        self._resume = state_dict.get("run")

    # The training

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Begin anew, for a training."""
        if stage != "fit":
            return
        goes_on = trainer is self._trainer and trainer.global_step > 0
        self._resume = self.state_dict().get("run") if goes_on else None
        self._trainer, self._session = trainer, Session(*self._arguments)
        self._losses, self._logged = [], {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the run and instrument the module, after the sanity check of the validation."""
        session = self._require_session()
        session.open(
            step=trainer.global_step,
            resume=self._resume,
            config=configuration(trainer, pl_module),
        )
        is_compiled = pl_module._compiler_ctx is not None  # Lightning's, of torch.compile(module)
        is_wrapped = trainer.strategy.model is not pl_module
        if is_wrapped and not is_compiled and region_of(pl_module) is not None:
            raise ValueError(
                f"{type(trainer.strategy).__name__} calls the training step as the forward of the"
                " module, which is compiled in place, and they cannot be told apart; pass"
                " torch.compile(module) to fit instead"
            )
        with self._take_switches(pl_module):
            measured = session.instrument(
                pl_module.training_step,
                module=pl_module,
                parts=None if is_compiled else parts(pl_module, with_root=not is_wrapped),
            )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        for optimizer in trainer.optimizers:
            session.watch(optimizer, scaler)
        self._methods = self._measured_methods(trainer, pl_module, measured)
        for name in ("log", "log_dict") if is_compiled else ():
            if is_of_lightning(pl_module, name):
                # Dynamo fails on what it finds inside: the signature of a bound method.
                call = torch.compiler.disable(getattr(pl_module, name))
                self._methods.add(pl_module, name, call)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the means of the last epoch."""
        self._log_news(trainer)
        if self._require_session().is_step_open:
            warn(
                f"step {self._step} is not recorded: training ended without an optimizer step that"
                " Lightning counts. With manual optimization, step what self.optimizers() gives,"
                " without use_pl_optimizer=False"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finish the run, or end it as stopped early."""
        if stage != "fit" or self._session is None:
            return
        self._methods.remove()
        if trainer.should_stop and not has_reached_its_end(trainer):
            reason = why_stopped(trainer)
            self._session.close(lambda run: run.stop_early(reason))
        else:
            self._session.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the run as failed."""
        self._methods.remove()
        if self._session is not None:
            self._session.close(lambda run: run.fail(exception))

    # Its steps

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the means of the epoch before."""
        self._methods.remove()  # where the epoch before was left in the middle
        self._log_news(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Put the measured ``training_step`` in the place of the module's own."""
        session = self._require_session()
        if session.is_step_open and begins_window(trainer, pl_module, batch_idx):
            # The epoch was left in the middle of a window, whose gradients are given up.
            session.go_on()
            session.discard_step()
            self._losses.clear()
        self._methods.install()

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        """Measure the gradients, where Lightning is about to clip them."""
        if clips(trainer, pl_module):
            self._require_session().measure_before_clip()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """End the step, if the optimizer has stepped."""
        session = self._require_session()
        if pl_module.automatic_optimization and isinstance(outputs, Mapping) and "loss" in outputs:
            # Lightning has divided it by the length of a full window.
            self._losses.append(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        if not session.is_step_open:
            return
        is_over = trainer.global_step > self._step
        if is_over and self._losses:
            session.log({"loss": torch.stack(self._losses).mean()})
            self._losses.clear()
        self._log_news(trainer)
        if is_over:
            session.go_on()
            session.end_step()
        else:
            session.end_micro_batch()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Record the results of a validation in the training step before it."""
        if not trainer.sanity_checking:
            self._log_news(trainer)

    # How

    def _measured_methods(
        self, trainer: pl.Trainer, module: pl.LightningModule, measured: Callable[..., Any]
    ) -> Substitutes:
        """What is to stand for methods of the module during a batch; copies have its own ones."""
        own_training_step, own_optimizer_step = module.training_step, module.optimizer_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            with self._window(trainer):
                return measured(*args, **kwargs)

        # Lightning looks here for the names of the arguments.
        training_step.__wrapped__ = getattr(  # type: ignore[attr-defined]
            own_training_step, "__wrapped__", own_training_step
        )

        def optimizer_step(
            epoch: int, batch_idx: int, optimizer: Any, closure: Callable[[], Any]
        ) -> None:
            def pausing_closure() -> Any:
                # A strategy may call the training step as the forward of the module.
                self._require_session().pause()
                return closure()

            # The closure runs the training step, after the optimizer's own hooks.
            with self._window(trainer):
                own_optimizer_step(epoch, batch_idx, optimizer, pausing_closure)

        methods = Substitutes()
        methods.add(module, "training_step", training_step)
        methods.add(module, "optimizer_step", optimizer_step)
        return methods

    @contextmanager
    def _take_switches(self, module: pl.LightningModule) -> Iterator[None]:
        """Keep what ``instrument`` puts into the module and its parts, for the windows only.

        A copy of a ``LightningModule`` would carry it, and run the original's weights.
        """
        calls = [(part, Replacement(part, COMPILED_CALL)) for part in module.modules()]
        yield
        self._switches = Substitutes()
        for part, call in calls:
            if not call.stands:
                self._switches.add(part, COMPILED_CALL, call.current())
                call.restore()

    @contextmanager
    def _window(self, trainer: pl.Trainer) -> Iterator[None]:
        """Measure what runs in the block; a step begins, if none is open.

        What others do with the module between two blocks, such as a validation while gradients
        are being accumulated, is not measured.
        """
        session = self._require_session()
        session.go_on()
        if self._is_inside:
            yield
            return
        if not session.is_step_open:
            self._step = trainer.global_step
            session.begin_step(self._step)
            session.log({"epoch": trainer.current_epoch, **learning_rates(trainer)})
        self._is_inside = True
        self._switches.install()
        try:
            yield
        finally:
            self._is_inside = False
            self._switches.remove()
            self._methods.remove()
            session.pause()

    def _log_news(self, trainer: pl.Trainer) -> None:
        """Record what was logged since the last call."""
        found = {
            key: value
            for key, value in trainer.logged_metrics.items()
            if isinstance(value, torch.Tensor)
        }
        # Each call of log makes a tensor; what was logged earlier stays where it was.
        news = {
            key: value
            for key, value in found.items()
            if key not in self._logged or self._logged[key].data_ptr() != value.data_ptr()
        }
        self._logged |= news
        if self._session is not None:
            self._session.log(news)

    def _require_session(self) -> Session:
        assert self._session is not None, "setup() comes first"
        return self._session
