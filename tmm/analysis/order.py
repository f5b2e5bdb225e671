"""The order in which the values of one step come about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from tmm.core.families import ACTIVATION, ACTIVATION_GRADIENT, STEP, Phase, family_of
from tmm.core.keys import is_loss, is_total_norm
from tmm.core.records import LOGGED, KeyInfo
from tmm.core.series_by_key import Recorded

Rank: TypeAlias = tuple[Phase, int]

_LAST = 1 << 62


def execution_ranks(recorded: Recorded, keys: Iterable[str] | None = None) -> dict[str, Rank]:
    """What orders keys as their values come about in a step; equal for metrics of one site.

    The forward pass first (outputs, attention, and values that the model records, by position),
    then losses, gradients of activations and of parameters (last layer first), updates,
    parameters, and the rest. Norms over several gradients follow the single ones.
    """
    names = recorded.keys()
    infos = [recorded.key_info(key) for key in names]
    forward = {info.site: info.position for info in infos if info.kind == ACTIVATION.name}
    backward = {info.site: info.position for info in infos if info.kind == ACTIVATION_GRADIENT.name}
    if not backward.keys() <= forward.keys():
        forward = backward  # they are in the order of the forward pass, too
    asked = infos if keys is None else [recorded.key_info(key) for key in keys]
    end = max((info.position for info in infos if info.kind == ACTIVATION.name), default=-1)
    return {info.key: _rank(info, forward, end) for info in asked}


def _rank(info: KeyInfo, forward: dict[str, int], end: int) -> Rank:
    part = _part(info, end)
    if part is Phase.BACKWARD:
        return part, -forward[info.site]
    if part is Phase.GRADIENT:
        if info.kind == STEP.name:
            return part, _LAST
        return part, -_position_of_module(info.site, forward, info.position)
    return part, info.position


def _position_of_module(parameter: str, forward: dict[str, int], position: int) -> int:
    """That of the parameter's module, or of the nearest around it; its own if none has one."""
    if not forward:
        return position
    parts = parameter.split(".")[:-1]
    around = (".".join(parts[:depth]) for depth in range(len(parts), 0, -1))
    return next((forward[name] for name in around if name in forward), -1)


def _part(info: KeyInfo, end: int) -> Phase:
    if is_loss(info):
        return Phase.LOSS
    if is_total_norm(info):
        return Phase.GRADIENT
    family = family_of(info.kind)
    if family is not None:
        return family.phase
    # Recorded by the model, or logged; runs of others do not say.
    is_logged = info.notes.partition("; ")[0] == LOGGED or info.position >= end
    return Phase.REST if is_logged else Phase.FORWARD
