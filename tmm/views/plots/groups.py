"""Keys that belong into one picture: one metric of many layers, in the order of depth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tmm.core.families import (
    ACTIVATION,
    ACTIVATION_DIFFERENCE,
    ACTIVATION_GRADIENT,
    ATTENTION,
    RCC,
    STEP,
    family_of,
)
from tmm.core.keys import TOTAL_NORM, is_without_bias, key_of, layer_of, metric_of, part_of_head
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded


@dataclass(frozen=True)
class Group:
    """One metric of one family: its ``keys`` from the input of the model to its output.

    ``labels`` name what was measured, and ``layers`` the module that it belongs to.
    """

    name: str
    family: str
    metric: str
    keys: tuple[str, ...]
    labels: tuple[str, ...]
    layers: tuple[str, ...]


def group_keys(recorded: Recorded, keys: Iterable[str]) -> tuple[tuple[Group, ...], list[str]]:
    """The groups of those keys that are of layers, and the other keys, in their order.

    A group may have one key only. Keys that a user logged, those of the system and of whole steps
    are the others.
    """
    infos = [recorded.key_info(key) for key in keys]
    found: dict[tuple[str, str, str], list[KeyInfo]] = {}
    others = []
    for info in infos:
        group = _group_of(info)
        if group is None:
            others.append(info.key)
        else:
            found.setdefault(group, []).append(info)
    depths = _Depths(recorded)
    groups = []
    for (name, family, metric), members in found.items():
        members.sort(key=depths.of)
        groups.append(
            Group(
                name,
                family,
                metric,
                tuple(info.key for info in members),
                tuple(_label(info) for info in members),
                tuple(layer_of(info) for info in members),
            )
        )
    return tuple(groups), others


def _group_of(info: KeyInfo) -> tuple[str, str, str] | None:
    """The name of a key's group, its family and its metric; None for a key of no layer."""
    if not layer_of(info):
        return None
    kind, metric = info.kind, metric_of(info)
    family = family_of(kind)
    if family is STEP:
        return f"{key_of(kind, TOTAL_NORM)} of blocks", kind, TOTAL_NORM
    if family is ATTENTION:
        return kind, kind, metric
    if family is RCC:
        name = kind if metric == "l2norm" else f"{kind}, {metric}"
        if is_without_bias(info):
            name += ", without bias"
        return name, kind, metric
    part = part_of_head(info)
    return f"{kind}/{metric}" + (f" of {part} in heads" if part else ""), kind, metric


def _label(info: KeyInfo) -> str:
    return layer_of(info) if info.kind == STEP.name else info.site


class _Depths:
    """Orders keys from a model's input to its output, parameters by the module that holds them."""

    def __init__(self, recorded: Recorded) -> None:
        names = recorded.keys()
        infos = [recorded.key_info(key) for key in names]
        self._forward: dict[str, int] = {}
        # Positions of one family are in one order; outputs are the most common.
        for family in (ACTIVATION, ACTIVATION_GRADIENT, ACTIVATION_DIFFERENCE):
            sites = [info for info in infos if info.kind == family.name and layer_of(info)]
            for info in sites:
                self._forward.setdefault(layer_of(info), info.position)
            if self._forward:
                break

    def of(self, info: KeyInfo) -> tuple[int, int]:
        layer: str = layer_of(info)
        while layer and layer not in self._forward:
            layer = layer.rpartition(".")[0]
        return self._forward.get(layer, -1), info.position
