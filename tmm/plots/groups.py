"""Keys that belong into one picture: one metric of many layers, in the order of depth."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from tmm.analysis.names import is_family, metric_of
from tmm.analysis.recorded import Recorded
from tmm.layout import ATTENTION, ROOT_NAME, KeyInfo

PARAMETER_FAMILIES = frozenset(
    ("gradient", "gradient_before_clip", "parameter", "parameter_difference")
) | {"update", "optimizer_state"}
"""Families whose sites are parameters; those of the others are tensors in the forward pass."""

_HEAD = re.compile(r"(\.call_\d+)?(\.head_\d+)?(\.(query|key|value|activation))?$")
_PART = re.compile(r"\.head_\d+\.(query|key|value|activation)$")
_NORM = "gradient_norm"


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


def layer_of(info: KeyInfo) -> str:
    """The module that a key belongs to; empty for keys that belong to none."""
    site = info.site
    if info.kind in PARAMETER_FAMILIES:
        return site.rpartition(".")[0] or ROOT_NAME
    if info.kind == "step":
        return site.removeprefix(f"{_NORM}/") if site.startswith(f"{_NORM}/") else ""
    if info.kind == "system" or not is_family(info.kind):
        return ""
    if site.startswith(ROOT_NAME):
        return ROOT_NAME
    if info.kind.startswith("RCC "):
        return site.removesuffix(".weight")
    if info.kind.startswith(f"{ATTENTION}_") or _PART.search(site):
        site = _HEAD.sub("", site)
    return site.partition("[")[0]


def _group_of(info: KeyInfo) -> tuple[str, str, str] | None:
    """The name of a key's group, its family and its metric; None for a key of no layer."""
    if not layer_of(info):
        return None
    kind, metric = info.kind, metric_of(info)
    if kind == "step":
        return f"{kind}/{_NORM} of blocks", kind, _NORM
    if kind.startswith(f"{ATTENTION}_"):
        return kind, kind, metric
    if kind.startswith("RCC "):
        name = kind if metric == "l2norm" else f"{kind}, {metric}"
        if info.site.endswith(".weight"):
            name += ", without bias"
        return name, kind, metric
    part = _PART.search(info.site)
    return f"{kind}/{metric}" + (f" of {part[1]} in heads" if part else ""), kind, metric


def _label(info: KeyInfo) -> str:
    return layer_of(info) if info.kind == "step" else info.site


class _Depths:
    """Orders keys from a model's input to its output, parameters by the module that holds them."""

    def __init__(self, recorded: Recorded) -> None:
        names = recorded.keys()
        infos = [recorded.key_info(key) for key in names]
        self._forward: dict[str, int] = {}
        # Positions of one family are in one order; outputs are the most common.
        for kind in ("activation", "activation_gradient", "activation_difference"):
            sites = [info for info in infos if info.kind == kind and layer_of(info)]
            for info in sites:
                self._forward.setdefault(layer_of(info), info.position)
            if self._forward:
                break

    def of(self, info: KeyInfo) -> tuple[int, int]:
        layer: str = layer_of(info)
        while layer and layer not in self._forward:
            layer = layer.rpartition(".")[0]
        return self._forward.get(layer, -1), info.position
