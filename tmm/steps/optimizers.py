"""What gradient scalers do to the steps of optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from tmm.core.keys import GRAD_SCALE, SKIPPED
from tmm.kernels.dense import packed_dtype
from tmm.runtime.step_collector import StepCollector
from tmm.steps.nested_optimizers import inner_optimizers, own_parameters

OpenCollector = Callable[[], StepCollector | None]
"""The collector of the monitored step that is open now."""


Observer = Callable[[Optimizer, torch.Tensor | None], None]
"""Told of each step of a scaler: the optimizer, and the scale that its gradients had."""

_OBSERVERS = "_tmm_observers"


def observe_steps(scaler: GradScaler, observer: Observer) -> None:
    """Have ``observer`` told after each ``scaler.step``; copies and pickles stay without it."""
    if _OBSERVERS not in vars(scaler):
        vars(scaler)[_OBSERVERS] = []
        kind = type(scaler)
        scaler.__class__ = type(kind.__name__, (_Observed, kind), {"plain_type": kind})
    vars(scaler)[_OBSERVERS].append(observer)


def stop_observing(scaler: GradScaler, observer: Observer) -> None:
    """Undo ``observe_steps``."""
    observers = vars(scaler)[_OBSERVERS]
    observers.remove(observer)
    if not observers:
        del vars(scaler)[_OBSERVERS]
        scaler.__class__ = scaler.plain_type  # type: ignore[attr-defined]


class _Observed(GradScaler):
    """Mixed into the class of a scaler while it is observed."""

    plain_type: type[GradScaler]

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        scale = self._scale.clone() if self.is_enabled() and self._scale is not None else None
        result = super().step(optimizer, *args, **kwargs)
        for observer in tuple(vars(self)[_OBSERVERS]):
            observer(optimizer, scale)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in self.__getstate__().items() if key != _OBSERVERS}
        return _bare, (self.plain_type,), state


def _bare(kind: type[GradScaler]) -> GradScaler:
    """A scaler that has no state yet."""
    return kind.__new__(kind)


class WatchedScaler:
    """Tells which gradients carry the factor of a scaler, and records skipped steps."""

    def __init__(self, scaler: GradScaler, collector: OpenCollector) -> None:
        self.scaler = scaler
        self.optimizers: list[Optimizer] = []
        self._collector = collector
        self._unscaled: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}
        observe_steps(scaler, self.note_step)

    def remove(self) -> None:
        """Give the scaler its own ``step`` back."""
        stop_observing(self.scaler, self.note_step)

    def factor(self, device: torch.device) -> torch.Tensor:
        """What to multiply the gradients of a scaled loss with, in ``packed_dtype``."""
        if not self.scaler.is_enabled():
            return torch.ones((), dtype=packed_dtype(device), device=device)
        scale = self.scaler._scale
        if scale is None:  # it is made when a loss is scaled for the first time
            initial = self.scaler._init_scale
            return torch.full((), 1.0 / initial, dtype=packed_dtype(device), device=device)
        wide = scale.to(packed_dtype(scale.device)).reciprocal()
        return wide.to(device, packed_dtype(device), non_blocking=True)

    def inverse_scale(self, optimizers: Iterable[Optimizer]) -> torch.Tensor | None:
        """What to multiply gradients with that these optimizers hold; None if they are unscaled.

        The scaler was told of one of them, as of the outermost of several.
        """
        scale = self.scaler._scale if self.scaler.is_enabled() else None
        if scale is None:
            return None
        for optimizer in optimizers:
            state = self.scaler._per_optimizer_states.get(id(optimizer))
            if state is not None and state["stage"] is not OptState.READY:
                return None
            if self._holds_old_gradients(optimizer):
                return None
        return scale.to(packed_dtype(scale.device)).reciprocal().float()

    def note_step(self, optimizer: Optimizer, scale: torch.Tensor | None) -> None:
        """Record a step of a watched optimizer that the scaler has just taken or skipped."""
        if not any(watched is optimizer for watched in self.optimizers) and not self._is_around(
            optimizer
        ):
            return
        gradient = _first_gradient(optimizer)
        if gradient is not None:
            self._unscaled[id(optimizer)] = (weakref.ref(gradient), gradient._version)
        collector = self._collector()
        if collector is not None and scale is not None:
            found = self.scaler._found_inf_per_device(optimizer).values()
            skipped = sum((flag.to(scale.device) for flag in found), torch.zeros_like(scale))
            collector.note_skipped(skipped)
            noted = torch.stack([(skipped > 0).to(scale.dtype), scale.detach()]).reshape(-1)
            collector.add_numbers((SKIPPED, GRAD_SCALE), noted, "max")

    def _is_around(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer that is not known yet, for it skips its first step, is one of ours.

        It is no matter outside of monitored steps.
        """
        if self._collector() is None:
            return False
        known = set().union(*(_all_parameters(other) for other in self.optimizers))
        return not known.isdisjoint(_all_parameters(optimizer))

    def _holds_old_gradients(self, optimizer: Optimizer) -> bool:
        """Whether the gradients are still those that a step has unscaled already."""
        gradient = _first_gradient(optimizer)
        if id(optimizer) not in self._unscaled or gradient is None:
            return False
        reference, version = self._unscaled[id(optimizer)]
        return reference() is gradient and version == gradient._version


def _all_parameters(optimizer: Optimizer) -> set[torch.nn.Parameter]:
    """Those of an optimizer, and of the ones inside of it."""
    return set().union(*map(own_parameters, (optimizer, *inner_optimizers(optimizer))))


def _first_gradient(optimizer: Optimizer) -> torch.Tensor | None:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return next((p.grad for p in parameters if p.grad is not None), None)
