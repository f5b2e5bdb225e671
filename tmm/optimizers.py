"""What optimizers and gradient scalers do, watched from their own hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from tmm.metrics import Reduction
from tmm.parameters import ParameterMonitor, Tensors
from tmm.runtime.collector import StepCollector, copy_to_host

OpenCollector = Callable[[], StepCollector | None]
"""The collector of the monitored step that is open now."""


class WatchedScaler:
    """Tells which gradients carry the factor of a scaler, and records skipped steps."""

    def __init__(self, scaler: GradScaler, collector: OpenCollector) -> None:
        self.scaler = scaler
        self._collector = collector
        self._plain_step = scaler.step
        self._unscaled: tuple[weakref.ref[torch.Tensor], int] | None = None
        scaler.step = self._step  # type: ignore[method-assign]

    def remove(self) -> None:
        """Give the scaler its own ``step`` back."""
        del self.scaler.__dict__["step"]

    def factor(self, device: torch.device) -> torch.Tensor:
        """What to multiply the gradients of a scaled loss with, float64."""
        if not self.scaler.is_enabled():
            return torch.ones((), dtype=torch.float64, device=device)
        scale = self.scaler._scale
        if scale is None:  # it is made when a loss is scaled for the first time
            initial = self.scaler._init_scale
            return torch.tensor(1.0 / initial, dtype=torch.float64, device=device)
        return scale.double().reciprocal().to(device, non_blocking=True)

    def inverse_scale(self, optimizer: Optimizer) -> torch.Tensor | None:
        """What to multiply the gradients of ``optimizer`` with; None if they are unscaled."""
        if not self.scaler.is_enabled():
            return None
        scale = self.scaler._scale
        stage = self.scaler._per_optimizer_states[id(optimizer)]["stage"]
        if scale is None or stage is not OptState.READY or self._holds_old_gradients(optimizer):
            return None
        return scale.double().reciprocal().float()

    def _step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        collector = self._collector()
        if not self.scaler.is_enabled():
            return self._plain_step(optimizer, *args, **kwargs)
        scale = None if self.scaler._scale is None else self.scaler._scale.clone()
        result = self._plain_step(optimizer, *args, **kwargs)
        gradient = _first_gradient(optimizer)
        self._unscaled = None if gradient is None else (weakref.ref(gradient), gradient._version)
        if collector is not None and scale is not None:
            found = self.scaler._found_inf_per_device(optimizer).values()
            skipped = sum((flag.to(scale.device) for flag in found), torch.zeros_like(scale))
            collector.skipped.append(copy_to_host(skipped))
            collector.log("step/skipped", (skipped > 0).float(), "max")
            collector.log("step/grad_scale", scale, "max")
        return result

    def _holds_old_gradients(self, optimizer: Optimizer) -> bool:
        """Whether the gradients are still those that a step has unscaled already."""
        gradient = _first_gradient(optimizer)
        if self._unscaled is None or gradient is None:
            return False
        reference, version = self._unscaled
        return reference() is gradient and version == gradient._version


class WatchedOptimizer:
    """Measures gradients and updates around each step of one optimizer."""

    def __init__(
        self,
        optimizer: Optimizer,
        scaler: WatchedScaler | None,
        parameters: ParameterMonitor,
        collector: OpenCollector,
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self._parameters = parameters
        self._collector = collector
        self._before: Tensors = {}
        self._handles = (
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def gradients(self) -> Tensors:
        """Gradients by name, without the factor of a scaler."""
        inverse = None if self.scaler is None else self.scaler.inverse_scale(self.optimizer)
        return {
            name: _unscaled(parameter.grad.detach(), inverse)
            for parameter, name in self._own_parameters().items()
            if parameter.grad is not None
        }

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        collector = self._collector()
        self._before = {}
        if collector is None:
            return
        if self._parameters.wants("update"):
            self._before = {
                name: parameter.detach().clone()
                for parameter, name in self._own_parameters().items()
                if self._parameters.plan.metrics(name, "update")
            }
        if not _has_closure(args, kwargs):
            self._add_gradients(collector)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        collector, before = self._collector(), self._before
        self._before = {}
        if collector is None:
            return
        if _has_closure(args, kwargs):
            self._add_gradients(collector)  # those of its last evaluation: there were none before
        if before:
            self._parameters.add_update(collector, before, self._skipped())
        if self._parameters.wants("optimizer_state"):
            self._add_state(collector)

    def _add_gradients(self, collector: StepCollector) -> None:
        self._parameters.add_gradients(collector, self.gradients(), unless=self._skipped())

    def _add_state(self, collector: StepCollector) -> None:
        names, plan = self._own_parameters(), self._parameters.plan
        tensors: dict[str, Tensors] = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if parameter not in names or "exp_avg_sq" not in state:
                    continue
                name = names[parameter]
                for metric in plan.metrics(name, "optimizer_state"):
                    tensors.setdefault(metric, {})[name] = _state_value(metric, group, state)
        if not tensors:
            kind = type(self.optimizer).__name__
            self._parameters.unmeasured[f"optimizer_state of {kind}"] = (
                "it keeps no exp_avg and exp_avg_sq"
            )
        for metric, by_name in tensors.items():
            self._parameters.add(
                collector,
                "optimizer_state",
                by_name,
                choose=partial(_computes_only, metric),
            )

    def _own_parameters(self) -> dict[torch.nn.Parameter, str]:
        """The model's parameters that this optimizer holds, with their names."""
        own = {p for group in self.optimizer.param_groups for p in group["params"]}
        return {p: name for p, name in self._parameters.names().items() if p in own}

    def _skipped(self) -> torch.Tensor | None:
        """Nonzero if the kernel of a fused step skips it, because of an infinite gradient."""
        found: torch.Tensor | None = getattr(self.optimizer, "found_inf", None)
        return found


def _unscaled(gradient: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
    if inverse is None:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)  # half precision would underflow
    return gradient.to(wide) * inverse.to(gradient.device, non_blocking=True)


def _has_closure(args: Any, kwargs: Any) -> bool:
    return kwargs.get("closure", args[1] if len(args) > 1 else None) is not None


def _first_gradient(optimizer: Optimizer) -> torch.Tensor | None:
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return next((p.grad for p in parameters if p.grad is not None), None)


def _computes_only(metric: str, reduction: Reduction) -> bool:
    return reduction.metrics == (metric,)


def _state_value(metric: str, group: dict[str, Any], state: dict[str, Any]) -> torch.Tensor:
    """The tensor that a metric of an optimizer's state is taken of."""
    if metric == "effective_lr":
        return _effective_rate(group, state)
    value: torch.Tensor = state[metric.removesuffix("_norm")]
    return value


def _effective_rate(group: dict[str, Any], state: dict[str, Any]) -> torch.Tensor:
    """What each element of ``exp_avg`` is multiplied with in a step of Adam."""
    first, second = group["betas"]
    step = torch.as_tensor(state["step"], dtype=torch.float64)
    squares: torch.Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    rate = torch.as_tensor(group["lr"], dtype=torch.float64) / (1 - first**step)
    root = (squares / (1 - second**step).to(squares)).sqrt_().add_(group["eps"])
    result: torch.Tensor = rate.to(squares) / root
    return result
