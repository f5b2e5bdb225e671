"""All that is watched around the steps of one model's optimizers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from tmm.optimizers import OpenCollector, WatchedOptimizer, WatchedScaler
from tmm.parameters import ParameterMonitor
from tmm.runtime.collector import StepCollector


class Watch:
    """The optimizers and scalers of one model, and the measurements that they set off.

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

    def add(self, optimizer: Optimizer, scaler: GradScaler | None) -> None:
        """Watch an optimizer; errors as of ``Monitor.watch``."""
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer={optimizer!r} is not a torch.optim.Optimizer")
        if scaler is not None and not isinstance(scaler, GradScaler):
            raise TypeError(f"scaler={scaler!r} is not a torch.amp.GradScaler")
        if any(watched.optimizer is optimizer for watched in self._optimizers):
            raise ValueError("the optimizer is watched already")
        names = self.parameters.names()
        if not any(p in names for group in optimizer.param_groups for p in group["params"]):
            raise ValueError("the optimizer holds no parameter of the instrumented model")
        others = [watched for watched in self._scalers if watched.scaler is not scaler]
        if scaler is not None and others and self.parameters.wants("activation_gradient"):
            raise ValueError(
                "scaler= is not the one that is watched already: gradients of activations can carry"
                " the factor of one scaler only"
            )
        watched_scaler = None if scaler is None else self._watched(scaler)
        self._optimizers.append(
            WatchedOptimizer(
                *(optimizer, watched_scaler, self.parameters, self._collector, self._note_failure)
            )
        )

    def may_watch(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer holds parameters of the model and is not watched yet."""
        names = self.parameters.names()
        holds = any(p in names for group in optimizer.param_groups for p in group["params"])
        return holds and all(watched.optimizer is not optimizer for watched in self._optimizers)

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
        self.parameters.add_gradients(collector, gradients, before_clip=before_clip)

    def end_step(self, collector: StepCollector) -> None:
        """Measure what is measured when a step ends."""
        try:
            if collector.monitored and self._optimizers and not collector.has_parameters:
                self.parameters.add_parameters(collector)
            self.parameters.end_step(collector)
        except Exception as error:
            self._note_failure(error)

    def drop_step(self) -> None:
        """Forget what belongs to the step."""
        self.parameters.end_step(None)

    def close(self) -> None:
        """Take all hooks off."""
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
