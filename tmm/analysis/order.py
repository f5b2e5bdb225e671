"""The order in which the values of one step come about."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from tmm.analysis.names import is_family, is_loss
from tmm.analysis.recorded import Recorded
from tmm.layout import ATTENTION, LOGGED, KeyInfo

Rank: TypeAlias = tuple[int, int]

FORWARD, LOSS, BACKWARD, GRADIENT, UPDATE, PARAMETER, REST = range(7)
"""The parts of a step."""

_LAST = 1 << 62
_PARTS = {
    "activation": FORWARD,
    "activation_gradient": BACKWARD,
    "gradient_before_clip": GRADIENT,
    "gradient": GRADIENT,
    "update": UPDATE,
    "optimizer_state": UPDATE,
    "parameter": PARAMETER,
}


def execution_ranks(recorded: Recorded, keys: Iterable[str] | None = None) -> dict[str, Rank]:
    """What orders keys as their values come about in a step; equal for metrics of one site.

    The forward pass first (outputs, attention, and values that the model records, by position),
    then losses, gradients of activations and of parameters (last layer first), updates,
    parameters, and the rest. Norms over several gradients follow the single ones.
    """
    names = recorded.keys()
    infos = [recorded.key_info(key) for key in names]
    forward = {info.site: info.position for info in infos if info.kind == "activation"}
    backward = {info.site: info.position for info in infos if info.kind == "activation_gradient"}
    if not backward.keys() <= forward.keys():
        forward = backward  # they are in the order of the forward pass, too
    asked = infos if keys is None else [recorded.key_info(key) for key in keys]
    end = max((info.position for info in infos if info.kind == "activation"), default=-1)
    return {info.key: _rank(info, forward, end) for info in asked}


def _rank(info: KeyInfo, forward: dict[str, int], end: int) -> Rank:
    part = _part(info, end)
    if part == BACKWARD:
        return part, -forward[info.site]
    if part == GRADIENT:
        if info.kind == "step":
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


def _part(info: KeyInfo, end: int) -> int:
    if is_loss(info):
        return LOSS
    if info.kind.startswith(f"{ATTENTION}_"):
        return FORWARD
    if info.kind == "step" and info.site.startswith("gradient_norm"):
        return GRADIENT
    if not is_family(info.kind):
        # Recorded by the model, or logged; runs of others do not say.
        is_logged = info.notes.partition("; ")[0] == LOGGED or info.position >= end
        return REST if is_logged else FORWARD
    return _PARTS.get(info.kind, REST)
