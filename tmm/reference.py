"""What parameters are compared with: a snapshot, another module or a state dict."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tmm.naming import parameter_names
from tmm.spec import Plan

DIFFERENCE = "parameter_difference"

_LISTED = 5  # differing names in a message


def reference_parameters(module: torch.nn.Module, plan: Plan) -> dict[str, torch.Tensor]:
    """The reference's tensors for the parameters that are compared with it, on their devices.

    ``"init"`` copies the parameters as they are now; parameters of a module or tensors of a state
    dict are used as they are, and only copied to another device. Raises ``ValueError`` that lists
    the names that are missing and those with another shape or dtype.
    """
    reference = plan.spec.reference
    if reference is None:
        return {}
    names = {name for name in plan.parameters if plan.metrics(name, DIFFERENCE)}
    own = {name: p.detach() for p, (name, _) in parameter_names(module).items() if name in names}
    if isinstance(reference, str):
        return {name: parameter.clone() for name, parameter in own.items()}
    found = _tensors(reference)
    problems = [f"{name} is missing" for name in own if name not in found]
    for name, parameter in own.items():
        other = found.get(name)
        if other is None:
            continue
        if other.shape != parameter.shape:
            problems.append(f"{name} has shape {tuple(other.shape)}, not {tuple(parameter.shape)}")
        elif other.dtype != parameter.dtype:
            problems.append(f"{name} has {other.dtype}, not {parameter.dtype}")
        elif other.numel() and other.data_ptr() == parameter.data_ptr():
            problems.append(f"{name} is the parameter itself, which will change: give a copy")
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ValueError(
            f"reference= does not fit the model: {'; '.join(problems[:_LISTED])}{more}"
        )
    return {name: found[name].to(parameter.device) for name, parameter in own.items()}


def _tensors(reference: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if isinstance(reference, torch.nn.Module):
        return {name: p.detach() for p, (name, _) in parameter_names(reference).items()}
    return {name: value.detach() for name, value in reference.items()}
