"""Find the optimizer that trains a model."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tmm.steps.model_steps import ModelSteps


class OptimizerFinder:
    """Watches each optimizer that steps and holds parameters of its model."""

    def __init__(self, steps: ModelSteps, scaler: GradScaler | None) -> None:
        self._steps = steps
        self._scaler = scaler
        if scaler is not None:
            steps.optimizers.expect(scaler)
        self._looked_at: WeakSet[Optimizer] = WeakSet()  # another one may have its number later
        self._handle = register_optimizer_step_pre_hook(self._look)

    def stop(self) -> None:
        """Look no longer."""
        self._handle.remove()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _look(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        if optimizer not in self._looked_at:
            self._looked_at.add(optimizer)
            if self._steps.optimizers.may_watch(optimizer):
                # Its own hooks run after those of all optimizers: it is measured in this step.
                self._steps.optimizers.watch(optimizer, self._scaler, finds_all=True)
