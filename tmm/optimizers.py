"""What optimizers and gradient scalers do, watched from their own hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from tmm.nested_optimizers import (
    OpenStep,
    OpenSteps,
    inner_optimizers,
    own_parameters,
    parameters_of,
)
from tmm.optimizer_state import add_states
from tmm.parameters import Gradients, ParameterMonitor, Tensors
from tmm.runtime.collector import StepCollector, copy_to_host
from tmm.runtime.copies import Copies

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
        """What to multiply the gradients of a scaled loss with, float64."""
        if not self.scaler.is_enabled():
            return torch.ones((), dtype=torch.float64, device=device)
        scale = self.scaler._scale
        if scale is None:  # it is made when a loss is scaled for the first time
            initial = self.scaler._init_scale
            return torch.tensor(1.0 / initial, dtype=torch.float64, device=device)
        return scale.double().reciprocal().to(device, non_blocking=True)

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
        return scale.double().reciprocal().float()

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
            collector.skipped.append(copy_to_host(skipped))
            collector.log("step/skipped", (skipped > 0).float(), "max")
            collector.log("step/grad_scale", scale, "max")

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


@dataclass(eq=False)
class GatheredStep:
    """What is known of a step of an optimizer, with those inside of it.

    ``taken`` tells which of these calls measured the gradient of a parameter; ``parameters`` are
    those whose values before the step are kept; ``stepped`` are those that a step is about.
    """

    gradients: Gradients = field(default_factory=Gradients)
    taken: dict[str, int] = field(default_factory=dict)
    parameters: Tensors = field(default_factory=dict)
    before: Tensors = field(default_factory=dict)
    stepped: set[str] = field(default_factory=set)
    copies: list[Copies] = field(default_factory=list)


class WatchedOptimizer:
    """Measures gradients and updates around each step of one optimizer.

    A step inside of another one that is watched is part of that: the update is what the outermost
    one did. The gradient of a parameter is the one that the innermost step saw, the last of
    several. ``is_found`` tells that nobody said that it is to be watched.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scaler: WatchedScaler | None,
        parameters: ParameterMonitor,
        collector: OpenCollector,
        steps: Steps,
        *,
        is_found: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self.scaler: WatchedScaler | None = None
        self.is_found = is_found
        if scaler is not None:
            self.use_scaler(scaler)
        self._parameters = parameters
        self._collector = collector
        self._steps = steps
        self._copies = Copies()
        self._before = optimizer.register_step_pre_hook(self._before_step)
        self._after = optimizer.register_step_post_hook(self._after_step)

    def use_scaler(self, scaler: WatchedScaler) -> None:
        """Take the factor of a scaler out of the gradients."""
        self.scaler = scaler
        if all(known is not self.optimizer for known in scaler.optimizers):
            scaler.optimizers.append(self.optimizer)

    def remove(self) -> None:
        """Take the hooks off."""
        self._before.remove()
        self._after.remove()

    def be_last(self) -> None:
        """Let the hooks run after those that users added later: they belong to the step."""
        optimizer = self.optimizer
        for hooks, handle in (
            (optimizer._optimizer_step_pre_hooks, self._before),
            (optimizer._optimizer_step_post_hooks, self._after),
        ):
            if handle.id in hooks and next(reversed(hooks)) != handle.id:
                hooks.move_to_end(handle.id)  # type: ignore[attr-defined]

    def gradients(self) -> Tensors:
        """Gradients by name, without the factor of a scaler."""
        return self._gradients_of(self._named(own_parameters(self.optimizer)))

    def _gradients_of(self, own: Mapping[torch.nn.Parameter, str]) -> Tensors:
        inverse = None if self.scaler is None else self.scaler.inverse_scale(self._sharing(own))
        return {
            name: _unscaled(parameter.grad.detach(), inverse)
            for parameter, name in own.items()
            if parameter.grad is not None
        }

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        collector = self._collector()
        if collector is None:
            return
        step = self._steps.begin(self, GatheredStep)
        gathered, has_closure = step.gathered, _has_closure(args, kwargs)
        own = self._named(own_parameters(optimizer))
        if self._parameters.wants("update"):
            # An optimizer without parameters steps those of others.
            reached = own or self._named(parameters_of(optimizer, self._parameters.names()))
            parameters: Tensors = {
                name: parameter  # whose memory a step may replace
                for parameter, name in reached.items()
                if name not in gathered.before
                and self._parameters.plan.select(name, parameter.dtype, "update")
                and (parameter.grad is not None or has_closure or not own)
                and self._parameters.ranks.owns(parameter)
            }
            if parameters:
                copies = Copies() if self._copies in gathered.copies else self._copies
                gathered.copies.append(copies)
                gathered.parameters |= parameters
                gathered.before |= copies.of(parameters)
        gathered.stepped.update(own.values())
        if not has_closure:
            self._take_gradients(step, own)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        collector = self._collector()
        step = None if collector is None else self._steps.end(self)
        if collector is None or step is None:
            return
        if _has_closure(args, kwargs):  # those of its last evaluation: there were none before
            own = self._named(own_parameters(optimizer))
            taken = step.gathered.taken
            # Steps inside saw what this one may have cleared.
            self._take_gradients(
                step, {p: name for p, name in own.items() if taken.get(name, -1) <= step.place}
            )
        if step.is_outermost:
            self._record(collector, step.gathered, [held.optimizer for held in step.holders])

    def _take_gradients(self, step: Step, own: Mapping[torch.nn.Parameter, str]) -> None:
        """Measure gradients, in the place of earlier ones of the same parameters."""
        if not self._parameters.wants("gradient"):
            return
        gathered, gradients = step.gathered, self._gradients_of(own)
        if not gathered.taken.keys().isdisjoint(gradients):
            gathered.gradients = self._parameters.without(gathered.gradients, gradients)
        gathered.gradients += self._parameters.measure_gradients(gradients)
        gathered.taken |= dict.fromkeys(gradients, step.place)

    def _record(
        self, collector: StepCollector, gathered: GatheredStep, optimizers: Sequence[Optimizer]
    ) -> None:
        """Hand what is known of a step that has ended to the collector."""
        skipped = next(filter(torch.is_tensor, map(_skipped, optimizers)), None)
        collector.has_stepped = True
        if not collector.has_gradients:  # else somebody measured them by an explicit call
            collector.has_watched_gradients = True
            self._parameters.add_gradients(collector, gathered.gradients, unless=skipped)
        now = {n: p for n, p in gathered.parameters.items() if n in gathered.stepped}
        before = {name: gathered.before[name] for name in now}
        if now:
            self._parameters.add_update(collector, now, before, skipped)
        if self._parameters.wants("optimizer_state"):
            names = {p: n for p, n in self._parameters.names().items() if n in gathered.stepped}
            add_states(collector, self._parameters, names, optimizers, skipped)

    def _sharing(self, own: Container[torch.nn.Parameter]) -> Iterator[Optimizer]:
        """The optimizers that hold some of the parameters, too, and this one."""
        assert self.scaler is not None
        yield self.optimizer
        for optimizer in (*inner_optimizers(self.optimizer), *self.scaler.optimizers):
            if any(p in own for group in optimizer.param_groups for p in group["params"]):
                yield optimizer

    def _named(self, own: Container[torch.nn.Parameter]) -> dict[torch.nn.Parameter, str]:
        """Those that are the model's, with their names, in its order."""
        return {p: name for p, name in self._parameters.names().items() if p in own}


Steps = OpenSteps[WatchedOptimizer, GatheredStep]
Step = OpenStep[WatchedOptimizer, GatheredStep]


def _skipped(optimizer: Optimizer) -> torch.Tensor | None:
    """Nonzero if the kernel of a fused step skips it, because of an infinite gradient."""
    found: torch.Tensor | None = getattr(optimizer, "found_inf", None)
    return found


def _unscaled(gradient: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
    if inverse is None:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)  # half precision would underflow
    return gradient.to(wide) * inverse.to(gradient.device, non_blocking=True)


def _has_closure(args: Any, kwargs: Any) -> bool:
    return kwargs.get("closure", args[1] if len(args) > 1 else None) is not None


def _all_parameters(optimizer: Optimizer) -> set[torch.nn.Parameter]:
    """Those of an optimizer, and of the ones inside of it."""
    return set().union(*map(own_parameters, (optimizer, *inner_optimizers(optimizer))))


def _first_gradient(optimizer: Optimizer) -> torch.Tensor | None:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return next((p.grad for p in parameters if p.grad is not None), None)
