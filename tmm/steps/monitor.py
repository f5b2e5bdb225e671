"""What a user holds of an instrumented model: its steps, and the values logged in them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler

from tmm.core.metrics import Aggregate
from tmm.spec.reference import load_reference
from tmm.spec.spec import ReferenceSource, Spec, check_reference
from tmm.steps.archive import Value
from tmm.steps.logged_values import check_logged, one_number, real_values, tell_of_no_step
from tmm.steps.model_steps import ModelSteps
from tmm.steps.step_block import StepBlock


class Monitor:
    """Runs the steps of one instrumented model; ``tmm.monitor(model)`` gives it.

    A step is open from ``begin_step`` to ``end_step``; ``with monitor.step(n):`` is both. Forward
    passes in an open, monitored step are measured, and those of the training together make the
    values of the step; see ``ForwardPasses``. Whatever runs outside of a step runs the user's own
    compiled program.
    """

    def __init__(self, steps: ModelSteps) -> None:
        self._steps = steps

    @property
    def spec(self) -> Spec:
        """What is measured."""
        return self._steps.twin.plan.spec

    @property
    def module(self) -> torch.nn.Module:
        """The module whose parts are measured."""
        return self._steps.twin.module

    @property
    def path(self) -> Path | None:
        """The folder of the run that this process records; None without one."""
        return self._steps.archive.path

    # Steps

    @property
    def current_step(self) -> int | None:
        """The step that began last; None before any."""
        return self._steps.timeline.begun

    @property
    def is_step_open(self) -> bool:
        """Whether a step is open, monitored or not."""
        return self._steps.timeline.is_open

    def is_step_monitored(self, step: int) -> bool:
        """Whether the spec monitors ``step``."""
        return self.spec.is_step_monitored(step)

    def is_monitoring(self) -> bool:
        """Whether a forward pass would be measured now."""
        return self._steps.recorder.is_monitoring()

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
        return self._steps.begin_step(step)

    def end_step(self) -> None:
        """Close the open step and hand what it measured to the run.

        Raises:
            RuntimeError: if no step is open.
            ValueError: for a user's aggregate that fails, in the first monitored step.
            OSError: if what was measured before could not be written.
            tmm.AlertError: for what goes wrong in the step, where the spec says so.
        """
        self._steps.end_step()

    def step(self, step: int) -> StepBlock:
        """``with monitor.step(n):`` is ``begin_step(n)`` before and ``end_step()`` after the block.

        An exception in the block drops what the step measured; the monitor stays usable.
        """
        block = StepBlock(self._steps, step)
        self._steps.forgotten.note_block(block)
        return block

    def after_micro_batch(self) -> None:
        """Mark the end of a micro-batch. All micro-batches of a step are joined.

        Raises:
            RuntimeError: if no step is open.
        """
        self._steps.after_micro_batch()

    def no_monitor(self) -> AbstractContextManager[None]:
        """Do not measure forward passes in the block, such as those of an evaluation."""
        return self._steps.recorder.no_monitor()

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Compile the monitored program for these arguments of the model, ahead of its first step.

        Runs one forward pass and leaves random state and buffers as they were; nothing is
        recorded.

        Raises:
            RuntimeError: if a step is open, or the model is a step function, which could change
                more than that.
        """
        if self.is_step_open:
            raise RuntimeError("prepare(): call it before begin_step, or after end_step")
        if self._steps.twin.root.module is None:
            raise RuntimeError("prepare(): a step function would train; its first step compiles")
        self._steps.compile_ahead(*args, **kwargs)

    def close(self) -> None:
        """Write what is left, and close the run's files; the monitor cannot record afterwards."""
        self._steps.close()

    # Values

    def log_scalar(
        self,
        key: str,
        value: float | torch.Tensor,
        aggregate: Aggregate = "mean",
        force: bool = False,
    ) -> None:
        """Record a number under ``key``; several of one step are joined by ``aggregate``.

        A tensor on an accelerator is not waited for. Nothing happens in a step that is not
        monitored, but with ``force=True``; where no step is open, a warning says so, once.

        Raises:
            ValueError: if ``value`` is not one number, or for a key or aggregate that cannot be.
            TypeError: if ``value`` is no number at all.
        """
        check_logged("log_scalar", key, aggregate)
        number = one_number("log_scalar", key, value)
        if self._steps.recorder.recording or force:
            self._steps.timeline.require("log_scalar").log(key, number, aggregate)
        else:
            tell_of_no_step("log_scalar", key, self._steps.timeline, self._steps.gaps)

    def log_scalars(self, values: Mapping[str, float | torch.Tensor], force: bool = False) -> None:
        """``log_scalar`` for each item."""
        if not isinstance(values, Mapping):
            raise TypeError(f"log_scalars({values!r}): give a dictionary, such as {{'loss': 0.5}}")
        for key, value in values.items():
            self.log_scalar(key, value, force=force)

    def log_tensor(self, key: str, tensor: torch.Tensor, aggregate: Aggregate = "mean") -> None:
        """Record under ``key`` the elements of ``tensor``, joined by ``aggregate``.

        All elements logged under the key in one step are joined. Nothing happens in a step that is
        not monitored; where no step is open, a warning says so, once.

        Raises:
            ValueError: for a key or aggregate that cannot be.
            TypeError: if ``tensor`` is not a tensor.
        """
        check_logged("log_tensor", key, aggregate)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"log_tensor({key!r}): {tensor!r} is not a tensor; torch.as_tensor(...) makes one"
            )
        tensor = real_values("log_tensor", key, tensor)
        if self._steps.recorder.recording:
            self._steps.timeline.require("log_tensor").log(key, tensor, aggregate)
        else:
            tell_of_no_step("log_tensor", key, self._steps.timeline, self._steps.gaps)

    def get_step_metrics(self) -> dict[str, Value]:
        """Key to value of the step that ended last; empty if it was not monitored.

        Histograms are arrays of shape ``(bins,)``. Waits for an accelerator that is still busy
        with the step.
        """
        latest = self._steps.archive.latest
        return {} if latest is None else latest.record().by_key()

    def get_all_metrics(self) -> dict[int, dict[str, Value]]:
        """Step to the metrics of that step, of all steps recorded so far (of the whole run).

        Empty in a process whose rows another one records.
        """
        return self._steps.archive.all_metrics()

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
        twin = self._steps.twin
        is_joined = twin.attribution.ranks.size > 1
        self._steps.compare_with(
            load_reference(self.module, twin.plan, reference, is_joined=is_joined)
        )

    def remove_reference(self) -> None:
        """Compare with nothing from now on, and give up the reference's memory.

        Raises:
            RuntimeError: if a step is open.
        """
        self._steps.compare_with(None)

    def give_reference_inputs(self, *args: Any, **kwargs: Any) -> None:
        """Compare the model's next forward pass with one of the reference on these inputs.

        They are matched with the model's by the names of its arguments; without this call they are
        the same. Tensors that differ in shape or dtype are refused by that forward pass.

        Raises:
            RuntimeError: if there is no reference.
        """
        comparing = self._steps.twin.comparing
        if comparing is None:
            raise RuntimeError("give_reference_inputs(): there is no reference; set_reference(...)")
        comparing.inputs.give(args, kwargs)

    # Parameters

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
        if self._steps.is_closed:
            self._steps.forgotten.note_closed(self.current_step or 0)
            return
        known = ("parameters", "activation_gradient")
        if scaler is None and not any(
            rule.subject in known or rule.family in known for rule in self.spec.rules
        ):
            self._steps.forgotten.note_watched_in_vain(self.current_step or 0, str(self.spec))
        self._steps.optimizers.watch(optimizer, scaler)

    def monitor_parameters(self) -> None:
        """Measure the parameters now instead of at the end of the step.

        Nothing happens outside of a monitored step.

        Raises:
            RuntimeError: for a second call in one step.
        """
        if self._steps.recorder.recording:
            self._steps.optimizers.measure_parameters(
                self._steps.timeline.require("monitor_parameters")
            )

    def monitor_gradients(self, before_clip: bool = False) -> None:
        """Measure the gradients now, as ``gradient_before_clip`` if they are yet to be clipped.

        Watched optimizers do so by themselves before their steps, but for ``before_clip``. The
        factor of a watched scaler is taken out. Nothing happens outside of a monitored step.

        Raises:
            RuntimeError: for a second call in one step, which would count them twice.
        """
        self._steps.measure_gradients(before_clip=before_clip)
