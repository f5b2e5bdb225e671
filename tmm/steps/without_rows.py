"""Parameters that a rule matches and that have no rows."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Set

import torch

from tmm.core.families import PARAMETER_DIFFERENCE

AROUND_STEPS = ("gradient", "update", "optimizer_state")
"""The families that are measured around the steps of optimizers."""

FROZEN = "frozen: requires_grad is False"
NOT_WATCHED = "no optimizer is watched: call monitor.watch(optimizer)"
NOT_HELD = "no optimizer that is watched holds it"
NO_STEP = "no optimizer that is watched has stepped in a monitored step"
NO_GRADIENT = "it had no gradient when its optimizer stepped"
NO_STATE = "its optimizer keeps nothing of what is asked"
NOT_COMPARED = "it was not compared with the reference"
GONE = "the model has no parameter of that name any more"


def why_without_rows(
    asked: Mapping[str, Iterable[str]],
    measured: Mapping[str, Set[str]],
    parameters: Mapping[str, torch.nn.Parameter],
    held: Container[torch.nn.Parameter] | None,
    is_ours: Callable[[str, torch.nn.Parameter | None], bool],
    *,
    has_stepped: bool = False,
) -> dict[str, str]:
    """``"gradient of 0.weight"`` and the like to the reason.

    Args:
        asked: by family, the names of the parameters that rules match.
        measured: by family, those that had rows in some step.
        parameters: those that the model has now, by name.
        held: those that are in an optimizer that is watched; None if none is.
        is_ours: whether this process measures a parameter, by its name, and not another one.
        has_stepped: whether an optimizer that is watched has stepped in a monitored step.
    """
    found: dict[str, str] = {}
    for family, names in asked.items():
        known = measured.get(family, frozenset())
        for name in names:
            parameter = parameters.get(name)
            if name in known or not is_ours(name, parameter):
                continue
            found[f"{family} of {name}"] = _why(
                family, parameter, held, is_first=not (known or has_stepped)
            )
    return found


def _why(
    family: str,
    parameter: torch.nn.Parameter | None,
    held: Container[torch.nn.Parameter] | None,
    *,
    is_first: bool,
) -> str:
    if parameter is None:
        return GONE
    if family in AROUND_STEPS and not parameter.requires_grad:
        return FROZEN
    if held is None:
        return NOT_WATCHED
    if family not in AROUND_STEPS:
        return NOT_COMPARED if family == PARAMETER_DIFFERENCE.name else NO_STEP
    if parameter not in held:
        return NOT_HELD
    if is_first:
        return NO_STEP
    return NO_STATE if family == "optimizer_state" else NO_GRADIENT
