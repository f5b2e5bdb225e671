"""What optimizers do, watched from their own hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from tmm.core.keys import OPTIMIZER_AGE
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.tensor_copies import Copies, bounded_parts
from tmm.steps.nested_optimizers import (
    OpenStep,
    OpenSteps,
    inner_optimizers,
    own_parameters,
    parameters_of,
)
from tmm.steps.optimizer_state import add_states, age_of
from tmm.steps.optimizers import OpenCollector, WatchedScaler
from tmm.steps.parameters import Gradients, ParameterMonitor, Tensors


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

    def forget(self) -> None:
        """Give the memory back: nothing of the step will be measured."""
        self.gradients = Gradients()
        self.parameters.clear()
        self.before.clear()
        self.copies.clear()


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """``method``, without keeping its object alive: an optimizer may live longer than a model.

    Dynamo compiles nothing of it.
    """
    reference = weakref.WeakMethod(method)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def call(*arguments: Any) -> None:
        if (found := reference()) is not None:
            found(*arguments)

    return call  # type: ignore[no-any-return]


class WatchedOptimizer:
    """Measures gradients and updates around each step of one optimizer.

    A step inside of another one that is watched is part of that: the update is what the outermost
    one did. The gradient of a parameter is the one that the innermost step saw, the last of
    several. ``is_found`` tells that nobody said that it is to be watched; ``note_failure`` is
    called with what goes wrong in measuring, so that no step of the optimizer ends by it.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scaler: WatchedScaler | None,
        parameters: ParameterMonitor,
        collector: OpenCollector,
        steps: Steps,
        *,
        note_failure: Callable[[Exception], None],
        is_found: bool = False,
    ) -> None:
        self.optimizer = optimizer
        self._note_failure = note_failure
        self.scaler: WatchedScaler | None = None
        self.is_found = is_found
        if scaler is not None:
            self.use_scaler(scaler)
        self._parameters = parameters
        self._collector = collector
        self._steps = steps
        self._copies = Copies()
        self._before = optimizer.register_step_pre_hook(_weakly(self._before_step))
        self._after = optimizer.register_step_post_hook(_weakly(self._after_step))

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
        _move_to_end(self.optimizer._optimizer_step_pre_hooks, self._before.id)
        _move_to_end(self.optimizer._optimizer_step_post_hooks, self._after.id)

    def gradients(self) -> Tensors:
        """Gradients by name, without the factor of a scaler."""
        return self._gradients_of(self._named(own_parameters(self.optimizer)))

    def _gradients_of(self, own: Mapping[torch.nn.Parameter, str]) -> Tensors:
        return {name: tensor for part in self._gradients_in_parts(own) for name, tensor in part}

    def _gradients_in_parts(
        self, own: Mapping[torch.nn.Parameter, str]
    ) -> Iterator[list[tuple[str, torch.Tensor]]]:
        """The same, such that what is unscaled takes little memory on an accelerator."""
        inverse = None if self.scaler is None else self.scaler.inverse_scale(self._sharing(own))
        scaled = {n: p.grad.detach() for p, n in own.items() if p.grad is not None}
        for part in (scaled,) if inverse is None else bounded_parts(scaled):
            yield [(name, _unscaled(gradient, inverse)) for name, gradient in part.items()]

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        collector = self._collector()
        if collector is None or collector.failed:
            return
        step = self._steps.begin(self, GatheredStep)
        with self._steps.lock:
            try:
                self._begin(collector, step, has_closure=_has_closure(args, kwargs))
            except Exception as error:
                step.gathered.forget()  # the step itself needs memory
                self._note_failure(error)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        collector = self._collector()
        step = None if collector is None else self._steps.end(self)
        if collector is None or step is None or collector.failed:
            return
        with self._steps.lock:
            try:
                self._end(collector, step, has_closure=_has_closure(args, kwargs))
            except Exception as error:
                self._note_failure(error)

    def _begin(self, collector: StepCollector, step: Step, *, has_closure: bool) -> None:
        """Keep what a step is about to change."""
        gathered, own = step.gathered, self._named(own_parameters(self.optimizer))
        if self._parameters.wants("update"):
            # An optimizer without parameters steps those of others.
            reached = own or self._named(parameters_of(self.optimizer, self._parameters.names()))
            parameters: Tensors = {
                name: parameter  # whose memory a step may replace
                for parameter, name in reached.items()
                if name not in gathered.before
                and self._parameters.plan.select(name, parameter.dtype, "update")
                and (parameter.grad is not None or has_closure or not own)
                and self._parameters.owns(name, parameter)
            }
            if parameters:
                copies = Copies() if self._copies in gathered.copies else self._copies
                gathered.copies.append(copies)
                gathered.parameters |= parameters
                gathered.before |= copies.of(parameters)
        gathered.stepped.update(own.values())
        self._note_gradients(collector, own)
        if not has_closure:
            self._take_gradients(collector, step, own)

    def _end(self, collector: StepCollector, step: Step, *, has_closure: bool) -> None:
        """Measure what a step has changed, if it is not inside of another one."""
        if has_closure:  # those of its last evaluation: there were none before
            own = self._named(own_parameters(self.optimizer))
            self._note_gradients(collector, own)
            taken = step.gathered.taken
            # Steps inside saw what this one may have cleared.
            own = {p: name for p, name in own.items() if taken.get(name, -1) <= step.place}
            self._take_gradients(collector, step, own)
        if step.is_outermost:
            self._record(collector, step.gathered, [held.optimizer for held in step.holders])

    def _note_gradients(
        self, collector: StepCollector, own: Mapping[torch.nn.Parameter, str]
    ) -> None:
        """They may be cleared before the step ends."""
        collector.has_trained |= not own or any(p.grad is not None for p in own)
        known = self._parameters.stepped
        known.update(n for p, n in own.items() if n not in known and p.grad is not None)

    def _take_gradients(
        self, collector: StepCollector, step: Step, own: Mapping[torch.nn.Parameter, str]
    ) -> None:
        """Measure gradients, in the place of earlier ones of the same parameters."""
        if collector.has_gradients or not self._parameters.wants("gradient"):
            return  # somebody measured them in this step by an explicit call, or nobody asks
        gathered = step.gathered
        for part in self._gradients_in_parts(own):
            gradients = dict(part)
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
        if self._parameters.plan.spec.diagnosis:
            ages = [age for optimizer in optimizers if (age := age_of(optimizer)) is not None]
            for age in ages[:1]:
                collector.add_numbers((OPTIMIZER_AGE,), age, "min")
        if not collector.has_gradients:  # nor by a call inside of the step
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


def _move_to_end(hooks: dict[int, Any], key: int) -> None:
    if key in hooks and next(reversed(hooks)) != key:
        hooks[key] = hooks.pop(key)


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
