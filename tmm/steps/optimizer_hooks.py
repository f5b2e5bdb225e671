"""All that is watched around the steps of one model's optimizers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from tmm.core.failures import Gaps
from tmm.core.families import PARAMETER_DIFFERENCE
from tmm.runtime.step_collector import StepCollector
from tmm.steps.nested_optimizers import (
    OpenSteps,
    inner_optimizers,
    own_parameters,
    parameters_of,
    unwrapped,
)
from tmm.steps.optimizers import OpenCollector, WatchedScaler
from tmm.steps.parameters import ParameterMonitor
from tmm.steps.watched_optimizer import Steps, WatchedOptimizer
from tmm.steps.without_rows import AROUND_STEPS, why_without_rows


class Watch:
    """The optimizers and scalers of one model, and the measurements that they set off.

    An optimizer that holds parameters of one that is watched is watched from its next step on: it
    may take the steps of the other one, or its place.

    ``note_failure`` is called with what goes wrong there: no training ends by it.
    """

    def __init__(
        self,
        parameters: ParameterMonitor,
        collector: OpenCollector,
        note_failure: Callable[[Exception], None],
    ) -> None:
        self.parameters = parameters
        self._collector = collector
        self._note_failure = note_failure
        self._optimizers: list[WatchedOptimizer] = []
        self._scalers: list[WatchedScaler] = []
        self._steps: Steps = OpenSteps()
        self._others: WeakSet[Optimizer] = WeakSet()  # have stepped, and hold parameters
        self.finds_optimizers = False  # somebody watches each one that steps
        self._has_measured = False  # in a monitored step
        self._has_stepped = False  # a watched optimizer, in a monitored step
        self._has_looked_at_unheld = False
        self._known_at_close: dict[str, str] | None = None
        self._handle: RemovableHandle | None = None
        if any(map(parameters.wants, AROUND_STEPS)):
            # Here, for hooks must not be added while they run; without keeping this alive.
            self._handle = register_optimizer_step_pre_hook(_looking(weakref.WeakMethod(self.look)))
            weakref.finalize(self, self._handle.remove)

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
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler={scaler!r} is not a torch.amp.GradScaler")
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
        others = [watched for watched in self._scalers if watched.scaler is not scaler]
        if scaler is not None and others and self.parameters.wants("activation_gradient"):
            raise ValueError(
                "scaler= is not the one that is watched already: gradients of activations can carry"
                " the factor of one scaler only"
            )
        watched_scaler = None if scaler is None else self._watched(scaler)
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
        if not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler={scaler!r} is not a torch.amp.GradScaler")
        self._watched(scaler)

    def knows(self, scaler: GradScaler) -> bool:
        """Whether the factor of a scaler is taken out already."""
        return any(watched.scaler is scaler for watched in self._scalers)

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
        owns = self.parameters.ranks.owns
        return why_without_rows(
            *(asked, self.parameters.measured, by_name, held, owns),
            has_stepped=self._has_stepped,
        )

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
            self._others.add(optimizer)  # unless somebody watches it from now on

    @property
    def has_scaler(self) -> bool:
        """Whether gradients carry the factor of a scaler."""
        return bool(self._scalers)

    def gradient_factor(self, device: torch.device) -> torch.Tensor | None:
        """What gradients of a scaled loss are to be multiplied with; None without a scaler."""
        return self._scalers[0].factor(device) if self._scalers else None

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
        if self._scalers:
            # Whether the others carry the factor of the scaler is not known.
            for name in gradients.keys() - dict(watched).keys():
                self.parameters.unmeasured[f"gradient of {name}"] = "its optimizer is not watched"
            gradients = {}
        gradients |= dict(watched)
        measured = self.parameters.measure_gradients(gradients, before_clip=before_clip)
        self.parameters.add_gradients(collector, measured, before_clip=before_clip)

    def end_step(self, collector: StepCollector, gaps: Gaps) -> None:
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
            self._look_for_gaps(collector, gaps)
        self._steps.forget()
        try:
            self.parameters.end_step(collector)
        except Exception as error:
            self._note_failure(error)

    def _look_for_gaps(self, collector: StepCollector, gaps: Gaps) -> None:
        written = self.parameters.written_later.found()
        if written is not None:
            text = (
                f"something wrote to parameters after the step of their optimizer, such as to"
                f" {written} in step {collector.step}: update/ is what the optimizer did, without"
                " that"
            )
            self.parameters.remarks.setdefault("update", text)
            gaps.warn_once("written later", collector.step, text)
        self._look_at_others(collector, gaps)
        self._look_at_unheld(collector, gaps)
        if (
            collector.has_stepped
            and any(name.startswith("optimizer_state") for name in self.parameters.unmeasured)
            and not self.parameters.measured.get("optimizer_state")
        ):
            text = (
                f"the optimizers that stepped in step {collector.step} keep nothing of what rules"
                " of optimizer_state ask for, which therefore have no rows: they are for Adam and"
                " its kind"
            )
            gaps.warn_once("no state", collector.step, text)
        missing = [
            family
            for family in AROUND_STEPS
            if self.parameters.wants(family)
            and not (family == "gradient" and collector.has_gradients)
        ]
        if not self._optimizers and not collector.has_parameters:  # else a step ends with them
            missing += [
                f for f in ("parameter", PARAMETER_DIFFERENCE.name) if self.parameters.wants(f)
            ]
        is_over = collector.has_stepped or collector.skipped or collector.failed
        is_expected = collector.ran_forward and self.parameters.plan.spec.is_strict
        if missing and is_expected and not is_over:
            fix = "End a step after optimizer.step(); if another optimizer steps, watch that one"
            if not self._optimizers:
                fix = (
                    "Call monitor.watch(optimizer), or run.watch(model), which finds it, and end a"
                    " step after optimizer.step()"
                )
            reason = f"no watched optimizer stepped in step {collector.step}"
            self.parameters.unmeasured.setdefault(", ".join(missing), reason)
            gaps.warn_once(
                "no optimizer step",
                collector.step,
                f"{reason}, so that rules of {', '.join(missing)} have no rows. {fix}",
            )

    def _look_at_others(self, collector: StepCollector, gaps: Gaps) -> None:
        """Name the parameters of optimizers that stepped, and that nobody watches."""
        watched = {held.optimizer for held in self._optimizers}
        others = [optimizer for optimizer in self._others if optimizer not in watched]
        self._others.clear()
        for optimizer in others:
            names = self.parameters.names()
            held = parameters_of(optimizer, names)
            plan = self.parameters.plan
            unmeasured = [
                name
                for parameter, name in names.items()
                if parameter in held and any(plan.metrics(name, family) for family in AROUND_STEPS)
            ]
            for name in unmeasured:
                reason = "its optimizer is not watched"
                self.parameters.unmeasured.setdefault(f"gradient and update of {name}", reason)
            if unmeasured:
                gaps.warn_once(
                    "unwatched",
                    collector.step,
                    f"an optimizer that is not watched stepped in step {collector.step}: gradients"
                    f" and updates of its {len(unmeasured)} parameters have no rows, such as"
                    f" {unmeasured[0]}. Call monitor.watch(optimizer) for each optimizer",
                )

    def _look_at_unheld(self, collector: StepCollector, gaps: Gaps) -> None:
        """Name, once, parameters with gradients that are in no optimizer that is watched."""
        if self._has_looked_at_unheld or self.finds_optimizers or not collector.has_stepped:
            return
        self._has_looked_at_unheld = True
        held, plan = self._held(), self.parameters.plan
        unheld = [
            name
            for parameter, name in self.parameters.names().items()
            if parameter.requires_grad
            and parameter.grad is not None
            and parameter not in held
            and any(plan.metrics(name, family) for family in AROUND_STEPS)
        ]
        if unheld:
            gaps.warn_once(
                "unwatched",
                collector.step,
                f"no optimizer that is watched holds {unheld[0]}"
                + (f" and {len(unheld) - 1} more parameters" if len(unheld) > 1 else "")
                + ", which have gradients: their gradients and updates have no rows. Call"
                " monitor.watch(optimizer) for each optimizer",
            )

    def drop_step(self) -> None:
        """Forget what belongs to the step."""
        self._others.clear()
        self._steps.forget()
        self.parameters.end_step(None)

    def close(self) -> None:
        """Take all hooks off."""
        self._known_at_close = self.without_rows()
        if self._handle is not None:
            self._handle.remove()
        for optimizer in self._optimizers:
            optimizer.remove()
        for scaler in self._scalers:
            scaler.remove()
        self._optimizers.clear()
        self._scalers.clear()

    def _watched(self, scaler: GradScaler) -> WatchedScaler:
        for watched in self._scalers:
            if watched.scaler is scaler:
                return watched
        self._scalers.append(WatchedScaler(scaler, self._collector))
        return self._scalers[-1]


def _looking(look: weakref.WeakMethod[Callable[[Optimizer], None]]) -> Callable[..., None]:
    """A hook of all optimizers that calls a method as long as its object lives."""

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def hook(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        method = look()
        if method is not None:
            method(optimizer)

    return hook  # type: ignore[no-any-return]
