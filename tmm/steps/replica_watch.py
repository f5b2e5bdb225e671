"""Looks, each so many steps, whether ranks still hold the same parameters."""

from __future__ import annotations

import torch

from tmm.core.failures import Gaps
from tmm.core.keys import REPLICAS_DIFFERING, replica_key
from tmm.runtime.step_collector import StepCollector
from tmm.spec.spec import Spec
from tmm.steps.agreement import ReplicaCheck

EVENT = "replicas"


class ReplicaWatch:
    """Compares replicas at the end of the steps that ``spec.replicas_agree`` names.

    All ranks end the same steps. What differs is warned of once, kept as an event, and recorded.
    """

    def __init__(self, module: torch.nn.Module, spec: Spec, gaps: Gaps) -> None:
        self._every = spec.replicas_agree
        self._check = None if self._every is None else ReplicaCheck(module)
        self._gaps = gaps

    def look(self, step: StepCollector) -> None:
        """Compare, if it is time to, and add what was found to a step that is about to end."""
        if self._check is None or self._every is None or step.step % self._every:
            return
        found = self._check()
        if not found.compared:
            return
        numbers = {REPLICAS_DIFFERING: float(len(found.differing))}
        if found.first is not None:
            numbers[replica_key(found.first)] = 1.0
            if not self._gaps.warn_once(EVENT, step.step, str(found), event=EVENT):
                self._gaps.add(step.step, str(found), EVENT)
        values = torch.tensor(list(numbers.values()), dtype=torch.float64, device="cpu")
        step.add_numbers(tuple(numbers), values, "mean")
