"""The state that optimizers keep of parameters: rows of the family ``optimizer_state``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.optim import Optimizer

from tmm.core.metrics import STATE_METRICS, Reduction
from tmm.kernels.dense import packed_dtype
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.tensor_copies import bounded_parts
from tmm.steps.nested_optimizers import inner_optimizers
from tmm.steps.parameters import ParameterMonitor, Tensors

Group = dict[str, Any]

_OTHER_SHAPE = (
    "the optimizer keeps a tensor of shape {shape} for it, which is of several parameters, or of a"
    " part of it"
)
_DISTRIBUTED = "torch.distributed.optim"  # importing it compiles TorchScript, for a second


def age_of(optimizer: Optimizer) -> torch.Tensor | None:
    """How many steps the state of an optimizer has seen, one element; None where it is not kept.

    It is that of the first parameter that has a state, copied.
    """
    for state in optimizer.state.values():
        if isinstance(state, dict) and state:
            step = state.get("step")
            if isinstance(step, torch.Tensor):
                return step.detach().reshape(-1)[:1].to(packed_dtype(step.device), copy=True)
            return (
                None
                if step is None
                else torch.tensor([float(step)], dtype=torch.float64, device="cpu")
            )
    return None


def add_states(
    collector: StepCollector,
    parameters: ParameterMonitor,
    names: Mapping[torch.nn.Parameter, str],
    optimizers: Sequence[Optimizer],
    unless: torch.Tensor | None,
) -> None:
    """Measure what ``optimizers``, which have taken a step together, keep of parameters.

    Where several keep it, the innermost has what a step is computed from. The first is the
    outermost. Of what ``ZeroRedundancyOptimizer`` distributes each rank measures its part.
    """
    inside = (inner for optimizer in optimizers for inner in inner_optimizers(optimizer))
    involved = dict.fromkeys((*optimizers, *inside))
    kept: dict[torch.nn.Parameter, list[tuple[Optimizer, Group, Group]]] = {}
    for optimizer in reversed(involved):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                if parameter in names and (state or parameter.grad is not None):
                    kept.setdefault(parameter, []).append((optimizer, group, state))
    is_distributed = any(map(_is_distributed, optimizers))
    if parameters.ranks.size > 1 and not is_distributed:
        for parameter in names.keys() - kept.keys():
            name = names[parameter]
            if parameters.plan.metrics(name, "optimizer_state"):
                reason = "this rank keeps none, and that of other ranks is not looked for"
                parameters.unmeasured[f"optimizer_state of {name}"] = reason
    by_name = {names[parameter]: parameter for parameter in kept}
    size = parameters.ranks.size
    for part in bounded_parts(by_name):
        tensors: dict[tuple[str, bool], Tensors] = {}
        for name in part:
            for metric in parameters.plan.metrics(name, "optimizer_state"):
                found = (state_value(metric, *place) for place in kept[by_name[name]])
                value = next(filter(torch.is_tensor, found), None)
                if value is not None and (share := _share(value, by_name[name], size)):
                    tensors.setdefault((metric, share == "part"), {})[name] = value
                elif value is not None:
                    parameters.unmeasured[f"optimizer_state of {name}"] = _OTHER_SHAPE.format(
                        shape=tuple(value.shape)
                    )
                else:
                    kind = type(optimizers[0]).__name__
                    parameters.unmeasured[f"optimizer_state of {kind}: {metric}"] = (
                        "it is not known how this optimizer keeps it"
                    )
        for (metric, is_part), own in tensors.items():
            parameters.add(
                *(collector, "optimizer_state", own),
                unless=unless,
                choose=_Computes(metric),
                is_own=is_distributed or is_part,
            )


def _share(
    value: torch.Tensor, parameter: torch.Tensor, ranks: int
) -> Literal["whole", "part"] | None:
    """Whether a state is of a whole parameter, or of as large a part of it as other ranks have."""
    if value.numel() == parameter.numel():
        return "whole"
    rows = parameter.shape[0] // ranks if parameter.ndim and parameter.shape[0] % ranks == 0 else 0
    is_part = ranks > 1 and rows > 0 and value.shape == (rows, *parameter.shape[1:])
    return "part" if is_part else None


@dataclass(frozen=True)
class _Computes:
    """Chooses the reductions of one metric."""

    metric: str

    def __call__(self, reduction: Reduction) -> bool:
        return reduction.metrics == (self.metric,)


def state_value(
    metric: str, optimizer: Optimizer, group: dict[str, Any], state: dict[str, Any]
) -> torch.Tensor | None:
    """The tensor that a metric of an optimizer's state is taken of; None where it has none."""
    if metric == "effective_lr":
        known = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) and "step" in state
        return _effective_rate(group, state) if known else None
    value: torch.Tensor | None = state.get(STATE_METRICS[metric].kept)
    return value


def _effective_rate(group: dict[str, Any], state: dict[str, Any]) -> torch.Tensor:
    """What each element of ``exp_avg`` is multiplied with in a step of Adam."""
    squares: torch.Tensor = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    first, second, step, lr = map(_number, (*group["betas"], state["step"], group["lr"]))
    root = (squares / _like(1 - second**step, squares)).sqrt_().add_(group["eps"])
    result: torch.Tensor = _like(lr / (1 - first**step), squares) / root
    return result


def _number(value: Any) -> Any:
    """A number, or what a device knows only: float64 where that has it."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    if value.is_cpu:
        return value.double().item()  # which nobody waits for; a copy to a device would
    return value.to(packed_dtype(value.device))


def _like(value: float | torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """One element to compute with ``tensor``: of the host, a kernel is handed it as a number."""
    if isinstance(value, torch.Tensor):
        return value.to(tensor)
    return torch.tensor(value, dtype=tensor.dtype, device="cpu")


def _is_distributed(optimizer: Optimizer) -> bool:
    """Whether each rank keeps the state of a part of the parameters."""
    module = sys.modules.get(_DISTRIBUTED)
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)
