"""Which keys of a run are worth a line, where there is no room for all."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence

from tmm.core.families import SYSTEM
from tmm.core.keys import is_family, is_loss, is_total_loss, metric_of
from tmm.core.records import KeyInfo

_SYSTEM = re.compile(
    r"gpu_\d+\W(utilisation_percent|memory)|cpu_percent|load_average|process_memory"
)
_MEASURED = (
    ("step", ""),
    ("gradient", "norm"),
    ("update", "relative_norm"),
    ("activation", "rms"),
    ("activation_gradient", "rms"),
    ("parameter", "rms"),
)
"""Kinds and metrics that most runs have, those first that show trouble first."""

_DULL = ("nan_count", "inf_count", "histogram")


def choose_keys(infos: Sequence[KeyInfo], lines: int, anomalous: Iterable[str]) -> list[str]:
    """At most ``lines`` keys: logged ones, measured ones, then others.

    Losses come first. ``anomalous`` keys, the worst first, come before other measured ones; of
    these there are some of each kind, evenly spread over the model. At first logged keys get two
    fifths of the lines and system metrics a sixth; what is left over goes to those that want more.
    """
    keys = [info.key for info in infos]
    logged = _logged(infos)
    system = [i.key for i in infos if i.kind == SYSTEM.name and _SYSTEM.fullmatch(i.site)]
    first, last = logged[: max(1, 2 * lines // 5)], system[: lines // 6]
    others = set(keys).difference(logged)
    bad = [key for key in dict.fromkeys(anomalous) if key in others]
    measured = bad[: lines - len(first) - len(last)]
    measured += _spread(_by_kind(infos, set(bad)), lines - len(first) - len(last) - len(measured))
    wanted = dict.fromkeys([*first, *measured, *last, *logged, *system, *keys])
    chosen = set(list(wanted)[:lines])
    return [key for key in dict.fromkeys([*logged, *measured, *system, *keys]) if key in chosen]


def _logged(infos: Sequence[KeyInfo]) -> list[str]:
    own = [info for info in infos if not is_family(info.kind)]
    return [info.key for info in sorted(own, key=lambda i: (not is_total_loss(i), not is_loss(i)))]


def _by_kind(infos: Sequence[KeyInfo], without: Container[str]) -> dict[tuple[str, str], list[str]]:
    """The measured keys by kind and metric, in the order in which they are worth showing."""
    found: dict[tuple[str, str], list[str]] = {known: [] for known in _MEASURED}
    for info in infos:
        if is_family(info.kind) and info.kind != SYSTEM.name and info.key not in without:
            kind = (info.kind, "" if info.kind == "step" else metric_of(info))
            found.setdefault(kind, []).append(info.key)
    return {kind: keys for kind, keys in found.items() if kind[1] not in _DULL}


def _spread(keys: Mapping[tuple[str, str], Sequence[str]], room: int) -> list[str]:
    """``room`` of the keys: of the first kinds, each as many, from the first layer to the last."""
    shares = dict.fromkeys(keys, 0)
    while sum(shares.values()) < room:
        open_kinds = [kind for kind in keys if shares[kind] < len(keys[kind])]
        if not open_kinds:
            break
        for kind in open_kinds[: room - sum(shares.values())]:
            shares[kind] += 1
    return [
        keys[kind][place * (len(keys[kind]) - 1) // max(1, share - 1)]
        for kind, share in shares.items()
        for place in range(share)
    ]
