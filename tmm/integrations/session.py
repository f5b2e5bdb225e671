"""One training that a framework drives: its run, its model, and when its steps begin and end."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tmm.core.failures import warn
from tmm.instrumentation.regions import is_left_uncompiled
from tmm.runs.instrument import instrument, remove, steps_of
from tmm.runs.instrument import monitor as monitor_of
from tmm.runs.live import LiveRun
from tmm.runs.logged_numbers import numbers_in
from tmm.runs.start import start_run
from tmm.spec.default import default_spec
from tmm.spec.spec import Spec
from tmm.steps.model_steps import ModelSteps
from tmm.steps.monitor import Monitor

Model = TypeVar("Model", bound=Callable[..., Any])


class Session:
    """What the callbacks of all frameworks share. Only the process of rank 0 records.

    A step is numbered by the optimizer steps that were done before it, as in
    ``for step, batch in enumerate(loader)``. What is logged after its end, such as the results of a
    validation, belongs to it.

    Args:
        spec: what to measure; ``tmm.default_spec()`` without one.
        run: a run of ``tmm.start_run`` to record into, which its owner finishes. Without one, a run
            is started with ``options`` and finished with the training.
        options: further arguments of ``tmm.start_run``.

    Raises:
        TypeError: if ``spec`` is no ``tmm.Spec`` or ``run`` no run, there are ``options`` for a
            run that is given, or they say where to resume or are none of ``tmm.start_run``.
    """

    def __init__(
        self, spec: Spec | None, run: LiveRun | None, options: Mapping[str, Any] | None = None
    ) -> None:
        if spec is not None and not isinstance(spec, Spec):
            raise TypeError(f"spec={spec!r} is not a tmm.Spec; tmm.Spec(tmm.activation('rms'))")
        if run is not None and not isinstance(run, LiveRun):
            raise TypeError(f"run={run!r} is no run; make one with tmm.start_run(...)")
        if run is not None and options:
            raise TypeError(f"{', '.join(options)}: the run is given; tell tmm.start_run instead")
        for name in ("resume", "step"):
            if name in (options or {}):
                raise TypeError(
                    f"{name}= is what a checkpoint tells; to go on with a run without one, write"
                    " run=tmm.start_run(resume=...)"
                )
        known = inspect.signature(start_run).parameters
        for name in options or {}:
            if name not in known:
                raise TypeError(
                    f"{name}= is no argument of the callback, nor of tmm.start_run, which has"
                    f" {', '.join(known)}"
                )
        self.spec = default_spec() if spec is None else spec
        self.run = run
        self._owns_run = run is None
        self._options = dict(options or {})
        self._model: Callable[..., Any] | None = None
        self._steps: ModelSteps | None = None
        self._pauses = ExitStack()
        self._refused: set[str] = set()

    # The run and the model

    def open(
        self,
        *,
        step: int = 0,
        resume: str | None = None,
        config: Mapping[str, object] | None = None,
    ) -> None:
        """Start the run, or go on with the run at the path ``resume``, from ``step`` on.

        A run that is not there any more is warned of, and a new one started. Does nothing where the
        run was given.
        """
        if self.run is not None:
            return
        if resume is not None and not Path(resume).is_dir():
            warn(f"the run {resume} of the checkpoint is gone; a new one is started")
            resume = None
        options = self._options
        if resume is not None:
            kept = {name: options[name] for name in ("system_seconds", "sinks") if name in options}
            self.run = start_run(resume=resume, step=step, **kept)
        else:
            self.run = start_run(**{"config": config, **options}, step=step)

    def instrument(self, model: Model, **options: Any) -> Model:
        """``tmm.instrument(model)`` with the spec and the run; ``options`` are further ones."""
        assert self.run is not None, "open() comes first"
        if is_left_uncompiled(model):
            warn(
                f"no graph was captured: {type(model).__name__}.compile() compiles nothing, as"
                " Dynamo skips the forward of torch's own modules, such as nn.Linear and"
                " nn.Sequential. The training runs uncompiled, and is measured. Use"
                " torch.compile(module), or a class that has a forward of its own"
            )
        instrumented = instrument(model, self.spec, run=self.run, **options)
        self._model, self._steps = instrumented, steps_of(instrumented)
        return instrumented

    @property
    def is_instrumented(self) -> bool:
        """Whether there is a model."""
        return self._steps is not None

    @property
    def monitor(self) -> Monitor | None:
        """The monitor of the instrumented model; None without one."""
        return None if self._model is None else monitor_of(self._model)

    @property
    def steps(self) -> ModelSteps:
        """The steps of the instrumented model."""
        assert self._steps is not None, "instrument() comes first"
        return self._steps

    def watch(self, optimizer: Optimizer, scaler: GradScaler | None = None) -> None:
        """Watch an optimizer that trains the model and is not watched yet."""
        if self._steps is not None and self._steps.optimizers.may_watch(optimizer):
            self._steps.optimizers.watch(optimizer, scaler)

    # Steps

    @property
    def is_step_open(self) -> bool:
        """Whether a step has begun and not ended."""
        return self._steps is not None and self._steps.timeline.is_open

    def begin_step(self, step: int) -> None:
        """Begin a step; nothing happens if one is open, as for its later micro-batches."""
        if self._steps is not None and not self._steps.timeline.is_open:
            self._steps.begin_step(step)

    def end_micro_batch(self) -> None:
        """A micro-batch of the step is done, and others follow."""
        if self.is_step_open:
            self.steps.after_micro_batch()

    def measure_before_clip(self) -> None:
        """Measure gradients that are complete and not clipped yet; one call in a step counts."""
        if self._steps is None or (collector := self._steps.timeline.open) is None:
            return
        if not collector.has_gradients_before_clip:
            self._steps.measure_gradients(before_clip=True)

    def end_step(self) -> None:
        """End the step that is open, if there is one."""
        if self.is_step_open:
            self.steps.end_step()

    def discard_step(self) -> None:
        """Forget the step that is open, if there is one, as if it had not begun."""
        if self.is_step_open:
            self.steps.discard_step()

    def pause(self) -> None:
        """Measure no forward pass until ``go_on``: they are those of an evaluation."""
        if self._steps is not None:
            self._pauses.enter_context(self._steps.recorder.no_monitor())

    def go_on(self) -> None:
        """End each ``pause``."""
        self._pauses.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Measure no forward pass in the block."""
        self.pause()
        try:
            yield
        finally:
            self.go_on()

    def log(self, values: Mapping[str, object]) -> None:
        """Record the numbers among ``values`` in the step that is open or ended last.

        What is no number is left out; keys that tmm uses itself are warned of, once each.
        """
        if self.run is None or self.run.is_finished:
            return
        numbers: dict[str, torch.Tensor] = {}
        for key, value in values.items():
            try:
                numbers |= dict(numbers_in({key: value}))
            except TypeError:
                continue
            except ValueError as error:
                if key not in self._refused:
                    self._refused.add(key)
                    warn(str(error))
        if numbers:
            self.run.log(numbers)

    # The end

    @property
    def state(self) -> dict[str, str]:
        """What a checkpoint keeps, to go on with the same run: its path, which rank 0 knows."""
        if self.run is None or not self.run.is_recorded:
            return {}
        return {"run": str(self.run.path.absolute())}

    def close(self, end: Callable[[LiveRun], None] = LiveRun.finish) -> None:
        """Take the monitoring off the model, and ``end`` a run that was not given."""
        self.go_on()
        model, self._model, self._steps = self._model, None, None
        if model is not None:
            remove(model)
        if self._owns_run and self.run is not None:
            end(self.run)
