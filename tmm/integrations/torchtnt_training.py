"""One training of a TorchTNT unit: which optimizer step each of its batches belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

from tmm.integrations.session import Session
from tmm.steps.optimizers import observe_steps, stop_observing


class TrackedRun:
    """What the checkpoints of a unit keep: its run, and how many optimizer steps were done.

    It is one of the stateful attributes of a unit. ``training`` is the one under way, as the state
    of TorchTNT and what ends it.
    """

    def __init__(self) -> None:
        self.path = ""
        self.step: int | None = None  # not known before a training or checkpoint
        self.was_loaded = False
        self.training: tuple[object, Callable[[], None]] | None = None

    def state_dict(self) -> dict[str, object]:
        """The state; only the first of all processes knows the run."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        is_first = not distributed or torch.distributed.get_rank() == 0
        state: dict[str, object] = {"step": -1 if self.step is None else self.step}
        return {**state, "path": self.path} if is_first else state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a checkpoint; one that is loaded in part may leave all as it was."""
        step = int(state_dict["step"])
        self.step, self.path = None if step < 0 else step, str(state_dict.get("path", ""))
        self.was_loaded = True

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "training": None}  # no training goes on in a copy of the unit


class UnitTraining:
    """Opens and ends the steps of a session around the batches of a unit.

    A step ends with the first batch in which an optimizer of the module steps, or a scaler skips
    that; the batches before it were accumulated.
    """

    def __init__(
        self,
        session: Session,
        unit: Any,
        module: torch.nn.Module,
        scaler: GradScaler | None,
        tracked: TrackedRun,
        *,
        is_auto_unit: bool,
    ) -> None:
        self.session = session
        self.tracked = tracked
        self.has_batches = self.has_trained = False
        self._unit = unit
        self._scaler = scaler
        self._is_auto_unit = is_auto_unit
        self._returned_tuple = False
        self._outputs = Outputs()
        self._rates: dict[str, object] = {}
        self._is_open = self._has_stepped = False
        self._updates = Updates(module, scaler, self._find, self._note)
        for optimizer in self._optimizers().values():
            session.watch(optimizer, scaler)
        can_measure = is_auto_unit and hasattr(unit, "_update_weights")
        self._update = MeasuredUpdate(unit, session) if can_measure else None
        self._updates.start()

    @property
    def measures_before_clip(self) -> bool:
        """Whether the unit has a method that clips and steps, to measure before it."""
        return self._update is not None

    def begin_batch(self) -> None:
        """A batch is about to be trained on, or the unit looks whether there is one."""
        if self._has_stepped:
            self._end_step()  # by somebody else's optimizer step, after the last batch
        if not self._is_open:
            self._is_open = True
            self.session.begin_step(self.tracked.step or 0)

    def end_batch(self, output: object) -> None:
        """A batch was trained on; ``output`` is what ``train_step`` returned."""
        self.has_batches = True
        self._outputs.add(output)
        self._returned_tuple = isinstance(output, tuple)
        if self._has_stepped:
            self._end_step()
        else:
            self.session.end_micro_batch()

    def forget_empty_step(self) -> None:
        """Forget a step that was opened for a batch that there was not."""
        if self._is_open and not self._has_stepped and self._outputs.is_empty:
            self._is_open = False
            self.session.discard_step()

    def close(self) -> None:
        """Take all hooks off, and forget batches that no optimizer step has followed."""
        self._updates.stop()
        if self._update is not None:
            self._update.remove()
        if self._has_stepped:
            self._end_step()
        session = self.session
        if session.is_step_open and not session.steps.timeline.require("step").holds_logged:
            session.discard_step()

    def _end_step(self) -> None:
        total = self._is_auto_unit and self._returned_tuple
        self.session.log({**self._outputs.take(total=total), **self._rates})
        self._rates = {}
        self._is_open = self._has_stepped = False
        self.session.end_step()

    def _optimizers(self) -> dict[str, Optimizer]:
        """The optimizers of the unit that train the module, by name."""
        tracked: dict[str, Optimizer] = self._unit.tracked_optimizers()
        return {name: each for name, each in tracked.items() if self._updates.trains(each)}

    def _find(self, optimizer: Optimizer) -> None:
        """An optimizer that trains the module is about to step for the first time."""
        self.session.watch(optimizer, self._scaler)

    def _note(self, optimizer: Optimizer) -> None:
        """An optimizer has stepped, or was not allowed to by the scaler."""
        self.has_trained = True
        if not self._is_open:
            return
        if not self._has_stepped:
            self._has_stepped = True
            # Already here: other callbacks may save a checkpoint before this batch ends for ours.
            self.tracked.step = (self.tracked.step or 0) + 1
        self._rates |= learning_rates(self._optimizers(), optimizer)


class Updates:
    """Tells of each optimizer step that trains a module, and of those that a scaler skips.

    ``found`` is called before the first step of an optimizer, ``taken`` after each one.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        scaler: GradScaler | None,
        found: Callable[[Optimizer], None],
        taken: Callable[[Optimizer], None],
    ) -> None:
        self._parameters = frozenset(module.parameters())
        self._known: WeakSet[Optimizer] = WeakSet()
        self._scaler = scaler
        self._found, self._taken = found, taken
        self._handles: tuple[RemovableHandle, ...] = ()

    def start(self) -> None:
        """Tell from here on."""
        self._handles = (
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        )
        if self._scaler is not None:
            observe_steps(self._scaler, self._after)

    def trains(self, optimizer: Optimizer) -> bool:
        """Whether ``optimizer`` holds parameters of the module."""
        if optimizer in self._known:
            return True
        held = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if any(parameter in self._parameters for parameter in held):
            self._known.add(optimizer)
        return optimizer in self._known

    def stop(self) -> None:
        """Tell no longer."""
        for handle in self._handles:
            handle.remove()
        if self._scaler is not None:
            stop_observing(self._scaler, self._after)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _before(self, optimizer: Optimizer, *rest: object) -> None:
        if optimizer not in self._known and self.trains(optimizer):
            self._found(optimizer)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _after(self, optimizer: Optimizer, *rest: object) -> None:
        if self.trains(optimizer):
            self._taken(optimizer)


class Outputs:
    """The numbers that a unit returns batch by batch, joined by key."""

    def __init__(self) -> None:
        self.is_empty = True
        self._values: dict[str, list[torch.Tensor]] = {}

    def add(self, output: object, *, may_be_loss: bool = True) -> None:
        """Take what a step of the unit returned, as far as it has names.

        A scalar, also as the first of a tuple, is the loss if it ``may_be_loss``.
        """
        self.is_empty = False
        if isinstance(output, (tuple, list)) and output:
            output = output[0]
        if not isinstance(output, Mapping):
            output = {"loss": output} if may_be_loss else {}
        for key, value in output.items():
            if isinstance(value, (int, float)):
                value = torch.tensor(value, dtype=torch.float64, device="cpu")
            if isinstance(key, str) and isinstance(value, torch.Tensor) and value.ndim == 0:
                wide = torch.promote_types(value.dtype, torch.float32)
                self._values.setdefault(key, []).append(value.detach().to(wide))

    def take(self, *, total: bool = False) -> dict[str, torch.Tensor]:
        """The mean of each, or the ``total``, and forget them."""
        values, self._values, self.is_empty = self._values, {}, True
        return {
            key: torch.stack(parts).sum() if total else torch.stack(parts).mean()
            for key, parts in values.items()
        }


def learning_rates(optimizers: Mapping[str, Optimizer], stepped: Optimizer) -> dict[str, object]:
    """The rates of the optimizer that has ``stepped``, if it is one of those by name.

    Names of optimizers and of their parameter groups are left out where there is one only.
    """
    rates: dict[str, object] = {}
    for name, optimizer in optimizers.items():
        if optimizer is stepped:
            key = "learning_rate" if len(optimizers) == 1 else f"learning_rate/{name}"
            for index, group in enumerate(optimizer.param_groups):
                rate = group["lr"]
                suffix = "" if len(optimizer.param_groups) == 1 else f"/{group.get('name', index)}"
                rates[key + suffix] = rate.clone() if isinstance(rate, torch.Tensor) else rate
    return rates


class MeasuredUpdate:
    """Stands in the place of ``unit._update_weights``, which clips: gradients are complete then.

    Copies and pickles of the unit have the method of its class instead.
    """

    def __init__(self, unit: Any, session: Session) -> None:
        self._unit, self._session = unit, session
        self._original = unit._update_weights
        self._is_active = True
        vars(unit)["_update_weights"] = self

    def remove(self) -> None:
        """Give the unit back what it had, once nobody who came later stands in the place."""
        self._is_active = False
        stands = vars(self._unit).pop("_update_weights")
        while isinstance(stands, MeasuredUpdate) and not stands._is_active:
            stands = stands._original
        if getattr(stands, "__func__", None) is not type(self._unit)._update_weights:
            vars(self._unit)["_update_weights"] = stands

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Measure, if the unit clips, and do what it did."""
        if self._is_active and (self._unit.clip_grad_norm or self._unit.clip_grad_value):
            self._session.measure_before_clip()
        return self._original(*args, **kwargs)

    def __reduce__(self) -> Any:
        return getattr, (self._unit, "_update_weights")
