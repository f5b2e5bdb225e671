"""All that is watched around the steps of one model's optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from tmm.core.failures import Gaps
from tmm.runtime.step_collector import StepCollector
from tmm.steps.gradient_scale import GradientScale, check_scaler
from tmm.steps.nested_optimizers import (
    OpenSteps,
    inner_optimizers,
    own_parameters,
    parameters_of,
    unwrapped,
)
from tmm.steps.optimizers import OpenCollector
from tmm.steps.parameters import ParameterMonitor
from tmm.steps.untrained import Untrained
from tmm.steps.unwatched import Unwatched
from tmm.steps.watched_optimizer import Steps, WatchedOptimizer
from tmm.steps.without_rows import AROUND_STEPS, why_without_rows

_NO_GRADIENTS = (
    "monitor_gradients() found no gradient in step {step}, so that rules of gradient have no rows"
    " of it: call it after loss.backward() and before optimizer.zero_grad()"
)


class Watch:
    """The optimizers and scalers of one model, and the measurements that they set off.

    An optimizer that holds parameters of one that is watched is watched from its next step on: it
    may take the steps of the other one, or its place.

    ``note_failure`` is called with what goes wrong there: no training ends by it. ``has_probes``
    tells whether a graph measures gradients of activations already, ``trace_anew`` lets graphs be
    traced once more. ``is_asked`` tells whether the
    spec measures what only an optimizer's steps, or parameters, tell.
    """

    def __init__(
        self,
        parameters: ParameterMonitor,
        scale: GradientScale,
        collector: OpenCollector,
        note_failure: Callable[[Exception], None],
        gaps: Gaps,
        has_probes: Callable[[], bool],
        trace_anew: Callable[[], None],
    ) -> None:
        self.parameters = parameters
        self.scale = scale
        self._collector = collector
        self._note_failure = note_failure
        self._gaps = gaps
        self._has_probes = has_probes
        self._trace_anew = trace_anew
        self.is_asked = any(rule.subject == "parameters" for rule in parameters.plan.spec.rules)
        self._unwatched = Unwatched(parameters, gaps)
        self._untrained = Untrained()
        self._optimizers: list[WatchedOptimizer] = []
        self._steps: Steps = OpenSteps()
        self._has_measured = False  # in a monitored step
        self._has_stepped = False  # a watched optimizer, in a monitored step
        self._known_at_close: dict[str, str] | None = None
        self._handle: RemovableHandle | None = None
        if any(map(parameters.wants, AROUND_STEPS)):
            # Here, for hooks must not be added while they run; without keeping this alive.
            self._handle = register_optimizer_step_pre_hook(_looking(weakref.WeakMethod(self.look)))
            weakref.finalize(self, self._handle.remove)

    def watch(
        self, optimizer: object, scaler: GradScaler | None = None, *, finds_all: bool = False
    ) -> None:
        """``Monitor.watch``, whatever the spec measures.

        ``finds_all`` tells that each optimizer that steps is found.
        """
        self._unwatched.finds_all |= finds_all
        if scaler is not None and not self.scale.knows(scaler) and self._has_probes():
            opened = self._collector()
            if opened is not None and opened.ran_forward:
                raise RuntimeError(
                    "watch(scaler=...): call it before the forward pass of a monitored step; that"
                    " of this step measures gradients of activations without the scale"
                )
            self._trace_anew()
        self.add(optimizer, scaler)

    def add(self, optimizer: object, scaler: GradScaler | None, *, is_found: bool = False) -> None:
        """Watch an optimizer; errors as of ``Monitor.watch``."""
        inside = unwrapped(optimizer)
        if not inside:
            # Optimizers that are not initialized cannot be printed.
            kind = type(optimizer).__name__ if isinstance(optimizer, Optimizer) else repr(optimizer)
            raise TypeError(
                f"optimizer={kind} is not a torch.optim.Optimizer that calls its step hooks, and"
                " keeps none in its attributes; hand over the optimizer whose step changes the"
                " parameters"
            )
        check_scaler(scaler)
        names = self.parameters.names()
        found = [o for o in inside if parameters_of(o, names)]
        if not found:
            raise ValueError(
                "the optimizer holds no parameter of the instrumented model; what trains copies of"
                " them, such as master weights, cannot be measured"
            )
        known = {watched.optimizer: watched for watched in self._optimizers}
        if all(o in known and not known[o].is_found for o in found):
            raise ValueError("the optimizer is watched already")
        others = [watched for watched in self.scale.scalers if watched.scaler is not scaler]
        if scaler is not None and others and self.parameters.wants("activation_gradient"):
            raise ValueError(
                "scaler= is not the one that is watched already: gradients of activations can carry"
                " the factor of one scaler only"
            )
        watched_scaler = None if scaler is None else self.scale.watched(scaler, self._collector)
        for each in found:
            if each not in known:
                self._optimizers.append(
                    WatchedOptimizer(
                        *(each, watched_scaler, self.parameters, self._collector, self._steps),
                        note_failure=self._note_failure,
                        is_found=is_found,
                    )
                )
            elif known[each].is_found:
                known[each].is_found = is_found
                if watched_scaler is not None:
                    known[each].use_scaler(watched_scaler)

    def expect(self, scaler: GradScaler) -> None:
        """The loss is scaled by it, whichever optimizers are watched later."""
        check_scaler(scaler)
        self.scale.watched(scaler, self._collector)

    def may_watch(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds parameters of the model and is not watched yet."""
        holds = bool(parameters_of(optimizer, self.parameters.names()))
        return holds and all(watched.optimizer is not optimizer for watched in self._optimizers)

    def holds(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds parameters of the model."""
        return bool(parameters_of(optimizer, self.parameters.names()))

    def without_rows(self) -> dict[str, str]:
        """Parameters that a rule matches and that had no rows so far, by family, with the reason.

        Nothing before the first monitored step.
        """
        if self._known_at_close is not None:
            return self._known_at_close
        if not self._has_measured:
            return {}
        asked: dict[str, dict[str, None]] = {}
        for rule, names in self.parameters.plan.matched.items():
            if rule.subject == "parameters":
                asked.setdefault(rule.family, {}).update(dict.fromkeys(names))
        held = self._held() if self._optimizers else None
        by_name = {name: parameter for parameter, name in self.parameters.names().items()}
        return why_without_rows(
            *(asked, self.parameters.measured, by_name, held, self._measures),
            has_stepped=self._has_stepped,
        )

    def _measures(self, name: str, parameter: torch.nn.Parameter | None) -> bool:
        """Whether this process measures the parameter of a name, and not another one."""
        ranks = self.parameters.ranks
        if parameter is None:
            return not ranks.holders.is_elsewhere(name, ranks.rank)
        return ranks.owns(parameter, name)

    def _held(self) -> set[torch.nn.Parameter]:
        """The parameters in the optimizers that are watched, and in those inside of them."""
        optimizers = [watched.optimizer for watched in self._optimizers]
        inside = (inner for optimizer in optimizers for inner in inner_optimizers(optimizer))
        return set().union(*map(own_parameters, (*optimizers, *inside)))

    def look(self, optimizer: Optimizer) -> None:
        """An optimizer, any one, is about to step."""
        if not self._optimizers or self._collector() is None:
            return
        for watched in self._optimizers:
            if watched.optimizer is optimizer:
                watched.be_last()
                return
        names = self.parameters.names()
        held = parameters_of(optimizer, names)
        for watched in self._optimizers if held else ():
            if not held.isdisjoint(parameters_of(watched.optimizer, names)):
                # Its own hooks run after those of all optimizers: it is measured in this step.
                scaler = None if watched.scaler is None else watched.scaler.scaler
                self.add(optimizer, scaler, is_found=True)
                return
        if held:
            self._unwatched.note(optimizer)  # unless somebody watches it from now on

    def measure_parameters(self, collector: StepCollector) -> None:
        """Measure all parameters as they are now.

        Raises:
            RuntimeError: for a second call in one step.
        """
        if collector.has_parameters:
            raise RuntimeError("monitor_parameters() was called already in this step")
        collector.has_parameters = True
        self.parameters.add_parameters(collector)

    def measure_gradients(self, collector: StepCollector, *, before_clip: bool) -> None:
        """Measure all gradients as they are now, without the factor of a scaler."""
        if not before_clip and collector.has_watched_gradients:
            return  # a watched optimizer has measured them
        flag = "has_gradients_before_clip" if before_clip else "has_gradients"
        if getattr(collector, flag):
            raise RuntimeError(
                "monitor_gradients() was called already in this step; call it once, when the"
                " gradients of all micro-batches are there"
            )
        setattr(collector, flag, True)
        gradients = {
            name: parameter.grad.detach()
            for parameter, name in self.parameters.names().items()
            if parameter.grad is not None
        }
        watched = [gradient for w in self._optimizers for gradient in w.gradients().items()]
        if self.scale.scalers:
            # Whether the others carry the factor of the scaler is not known.
            for name in gradients.keys() - dict(watched).keys():
                self.parameters.unmeasured[f"gradient of {name}"] = "its optimizer is not watched"
            gradients = {}
        gradients |= dict(watched)
        measured = self.parameters.measure_gradients(gradients, before_clip=before_clip)
        self.parameters.add_gradients(collector, measured, before_clip=before_clip)
        asks = (
            self.parameters.plan.spec.measures("gradient") and not collector.has_watched_gradients
        )
        if asks and all(parameter.grad is None for parameter in self.parameters.names()):
            text = _NO_GRADIENTS.format(step=collector.step)
            self._gaps.warn_once("no gradients", collector.step, text)

    def end_step(self, collector: StepCollector) -> None:
        """Measure what is measured when a step ends, and warn of what is missing."""
        try:
            if collector.monitored and self._optimizers and not collector.has_parameters:
                self.parameters.add_parameters(collector)
            if collector.monitored:
                self.parameters.compare_ranks(collector)
        except Exception as error:
            self._note_failure(error)
        if collector.monitored:
            self._has_measured = self._has_measured or collector.ran_forward
            self._has_stepped = self._has_stepped or collector.has_stepped
            if self.is_asked:
                self._unwatched.look(collector, self._optimizers, self._held)
            if collector.has_stepped and self.parameters.plan.spec.diagnosis:
                self._untrained.note(collector, self.parameters.names(), self.without_rows)
        self._steps.forget()
        try:
            self.parameters.end_step(collector)
        except Exception as error:
            self._note_failure(error)

    def drop_step(self) -> None:
        """Forget what belongs to the step."""
        self._unwatched.forget()
        self._steps.forget()
        self.parameters.end_step(None)

    def close(self) -> None:
        """Take all hooks off."""
        self._known_at_close = self.without_rows()
        if self._handle is not None:
            self._handle.remove()
        for optimizer in self._optimizers:
            optimizer.remove()
        self._optimizers.clear()
        self.scale.close()


def _looking(look: weakref.WeakMethod[Callable[[Optimizer], None]]) -> Callable[..., None]:
    """A hook of all optimizers that calls a method as long as its object lives."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def hook(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        method = look()
        if method is not None:
            method(optimizer)

    return hook  # type: ignore[no-any-return]
