"""What optimizers that nobody watches leave without rows, told once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from weakref import WeakSet

import torch
from torch.optim import Optimizer

from tmm.core.failures import Gaps
from tmm.core.families import PARAMETER_DIFFERENCE
from tmm.runtime.step_collector import StepCollector
from tmm.steps.nested_optimizers import parameters_of
from tmm.steps.parameters import ParameterMonitor
from tmm.steps.watched_optimizer import WatchedOptimizer
from tmm.steps.without_rows import AROUND_STEPS


class Unwatched:
    """Looks, when a step ends, for rows around optimizer steps that are missing.

    ``finds_all`` tells that somebody watches each optimizer that steps.
    """

    def __init__(self, parameters: ParameterMonitor, gaps: Gaps) -> None:
        self.finds_all = False
        self._parameters = parameters
        self._gaps = gaps
        self._others: WeakSet[Optimizer] = WeakSet()  # have stepped, and hold parameters
        self._has_looked_at_unheld = False

    def note(self, optimizer: Optimizer) -> None:
        """An optimizer that holds parameters steps, and is not watched so far."""
        self._others.add(optimizer)

    def forget(self) -> None:
        """The step is given up."""
        self._others.clear()

    def look(
        self,
        collector: StepCollector,
        watched: Collection[WatchedOptimizer],
        held: Callable[[], Collection[torch.nn.Parameter]],
    ) -> None:
        """Warn of what has no rows in a monitored step that ends.

        ``held`` gives the parameters in the ``watched`` optimizers, and in those inside of them.
        """
        gaps = self._gaps
        written = self._parameters.written_later.found()
        if written is not None:
            text = (
                f"something wrote to parameters after the step of their optimizer, such as to"
                f" {written} in step {collector.step}: update/ is what the optimizer did, without"
                " that"
            )
            self._parameters.remarks.setdefault("update", text)
            gaps.warn_once("written later", collector.step, text)
        self._look_at_others(collector, watched)
        self._look_at_unheld(collector, held)
        self._look_at_gradients(collector)
        if (
            collector.has_stepped
            and any(name.startswith("optimizer_state") for name in self._parameters.unmeasured)
            and not self._parameters.measured.get("optimizer_state")
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
            if self._parameters.wants(family)
            and not (family == "gradient" and collector.has_gradients)
        ]
        if not watched and not collector.has_parameters:  # else a step ends with them
            missing += [
                f for f in ("parameter", PARAMETER_DIFFERENCE.name) if self._parameters.wants(f)
            ]
        is_over = collector.has_stepped or collector.skipped or collector.failed
        is_expected = collector.ran_forward and self._parameters.plan.spec.is_strict
        if missing and is_expected and not is_over:
            fix = "End a step after optimizer.step(); if another optimizer steps, watch that one"
            if not watched:
                fix = (
                    "Call monitor.watch(optimizer), or run.watch(model), which finds it, and end a"
                    " step after optimizer.step()"
                )
            reason = f"no watched optimizer stepped in step {collector.step}"
            self._parameters.unmeasured.setdefault(", ".join(missing), reason)
            gaps.warn_once(
                "no optimizer step",
                collector.step,
                f"{reason}, so that rules of {', '.join(missing)} have no rows. {fix}",
            )

    def _look_at_gradients(self, collector: StepCollector) -> None:
        """Say, once, that an optimizer stepped without any gradient."""
        families = [family for family in ("gradient", "update") if self._parameters.wants(family)]
        is_idle = collector.has_stepped and not collector.has_trained
        if not (families and is_idle and collector.ran_forward) or collector.has_gradients:
            return
        self._gaps.warn_once(
            "no gradients at the step",
            collector.step,
            f"optimizer.step() found no gradient in step {collector.step}, so that it trained"
            f" nothing, and rules of {', '.join(families)} have no rows of it. Call"
            " optimizer.zero_grad() after optimizer.step() or before backward(), not between"
            " backward() and optimizer.step()",
        )

    def _look_at_others(
        self, collector: StepCollector, watched: Collection[WatchedOptimizer]
    ) -> None:
        """Name the parameters of optimizers that stepped, and that nobody watches."""
        if not self._others:
            return
        known = {held.optimizer for held in watched}
        others = [optimizer for optimizer in self._others if optimizer not in known]
        self._others.clear()
        for optimizer in others:
            names = self._parameters.names()
            held = parameters_of(optimizer, names)
            plan = self._parameters.plan
            unmeasured = [
                name
                for parameter, name in names.items()
                if parameter in held and any(plan.metrics(name, family) for family in AROUND_STEPS)
            ]
            for name in unmeasured:
                reason = "its optimizer is not watched"
                self._parameters.unmeasured.setdefault(f"gradient and update of {name}", reason)
            if unmeasured:
                self._gaps.warn_once(
                    "unwatched",
                    collector.step,
                    f"an optimizer that is not watched stepped in step {collector.step}: gradients"
                    f" and updates of its {len(unmeasured)} parameters have no rows, such as"
                    f" {unmeasured[0]}. Call monitor.watch(optimizer) for each optimizer",
                )

    def _look_at_unheld(
        self, collector: StepCollector, find_held: Callable[[], Collection[torch.nn.Parameter]]
    ) -> None:
        """Name, once, parameters with gradients that are in no optimizer that is watched."""
        if self._has_looked_at_unheld or self.finds_all or not collector.has_stepped:
            return
        self._has_looked_at_unheld = True
        held, plan = find_held(), self._parameters.plan
        unheld = [
            name
            for parameter, name in self._parameters.names().items()
            if parameter.requires_grad
            and parameter.grad is not None
            and parameter not in held
            and any(plan.metrics(name, family) for family in AROUND_STEPS)
        ]
        if unheld:
            self._gaps.warn_once(
                "unwatched",
                collector.step,
                f"no optimizer that is watched holds {unheld[0]}"
                + (f" and {len(unheld) - 1} more parameters" if len(unheld) > 1 else "")
                + ", which have gradients: their gradients and updates have no rows. Call"
                " monitor.watch(optimizer) for each optimizer",
            )
