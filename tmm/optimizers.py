"""What optimizers and gradient scalers do, watched from their own hooks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from tmm.metrics import Reduction
from tmm.parameters import ParameterMonitor, Tensors
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

    def inverse_scale(self, optimizer: Optimizer) -> torch.Tensor | None:
        """What to multiply the gradients of ``optimizer`` with; None if they are unscaled."""
        if not self.scaler.is_enabled():
            return None
        scale = self.scaler._scale
        state = self.scaler._per_optimizer_states.get(id(optimizer))
        stage = OptState.READY if state is None else state["stage"]
        if scale is None or stage is not OptState.READY or self._holds_old_gradients(optimizer):
            return None
        return scale.double().reciprocal().float()

    def note_step(self, optimizer: Optimizer, scale: torch.Tensor | None) -> None:
        """Record a step of a watched optimizer that the scaler has just taken or skipped."""
        if not any(watched is optimizer for watched in self.optimizers):
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

    def _holds_old_gradients(self, optimizer: Optimizer) -> bool:
        """Whether the gradients are still those that a step has unscaled already."""
        gradient = _first_gradient(optimizer)
        if id(optimizer) not in self._unscaled or gradient is None:
            return False
        reference, version = self._unscaled[id(optimizer)]
        return reference() is gradient and version == gradient._version


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """``method``, without keeping its object alive: an optimizer may live longer than a model."""
    reference = weakref.WeakMethod(method)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def call(*arguments: Any) -> None:
        if (found := reference()) is not None:
            found(*arguments)

    return call  # type: ignore[no-any-return]


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
        if scaler is not None:
            scaler.optimizers.append(optimizer)
        self._parameters = parameters
        self._collector = collector
        self._now: Tensors = {}
        self._before: Tensors = {}
        self._copies = Copies()
        self._handles = (
            optimizer.register_step_pre_hook(_weakly(self._before_step)),
            optimizer.register_step_post_hook(_weakly(self._after_step)),
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def gradients(self) -> Tensors:
        """Gradients by name, without the factor of a scaler."""
        return self._gradients_of(self._own_parameters())

    def _gradients_of(self, own: Mapping[torch.nn.Parameter, str]) -> Tensors:
        inverse = None if self.scaler is None else self.scaler.inverse_scale(self.optimizer)
        return {
            name: _unscaled(parameter.grad.detach(), inverse)
            for parameter, name in own.items()
            if parameter.grad is not None
        }

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        collector = self._collector()
        self._now, self._before = {}, {}
        if collector is None:
            return
        own = self._own_parameters()
        if self._parameters.wants("update"):
            self._now = {
                name: parameter  # whose memory a step may replace
                for parameter, name in own.items()
                if self._parameters.plan.select(name, parameter.dtype, "update")
                and (parameter.grad is not None or _has_closure(args, kwargs))
                and self._parameters.ranks.owns(parameter)
            }
            self._before = self._copies.of(self._now)
        if not _has_closure(args, kwargs):
            self._add_gradients(collector, own)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        collector, now, before = self._collector(), self._now, self._before
        self._now, self._before = {}, {}
        if collector is None:
            return
        if _has_closure(args, kwargs):  # those of its last evaluation: there were none before
            self._add_gradients(collector, self._own_parameters())
        if before:
            self._parameters.add_update(collector, now, before, self._skipped())
        if self._parameters.wants("optimizer_state"):
            self._add_state(collector)

    def _add_gradients(
        self, collector: StepCollector, own: Mapping[torch.nn.Parameter, str]
    ) -> None:
        if collector.has_gradients:
            return  # somebody measured them in this step by an explicit call
        collector.has_watched_gradients = True
        self._parameters.add_gradients(collector, self._gradients_of(own), unless=self._skipped())

    def _add_state(self, collector: StepCollector) -> None:
        names, plan = self._own_parameters(), self._parameters.plan
        tensors: dict[str, Tensors] = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state.get(parameter, {})
                if parameter not in names or (not state and parameter.grad is None):
                    continue
                name = names[parameter]
                for metric in plan.metrics(name, "optimizer_state"):
                    value = _state_value(metric, self.optimizer, group, state)
                    if value is not None:
                        tensors.setdefault(metric, {})[name] = value
                    else:
                        kind = type(self.optimizer).__name__
                        self._parameters.unmeasured[f"optimizer_state of {kind}: {metric}"] = (
                            "it is not known how this optimizer keeps it"
                        )
        for metric, by_name in tensors.items():
            self._parameters.add(
                collector,
                "optimizer_state",
                by_name,
                unless=self._skipped(),
                choose=_Computes(metric),
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


@dataclass(frozen=True)
class _Computes:
    """Chooses the reductions of one metric."""

    metric: str

    def __call__(self, reduction: Reduction) -> bool:
        return reduction.metrics == (self.metric,)


def _state_value(
    metric: str, optimizer: Optimizer, group: dict[str, Any], state: dict[str, Any]
) -> torch.Tensor | None:
    """The tensor that a metric of an optimizer's state is taken of; None where it has none."""
    if metric == "effective_lr":
        known = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and "step" in state
        return _effective_rate(group, state) if known else None
    value: torch.Tensor | None = state.get(metric.removesuffix("_norm"))
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
