"""Memory that keeps growing."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, episodes
from tmm.analysis.ending import EndsWith, any_finite
from tmm.analysis.series import series_of
from tmm.core.families import SYSTEM
from tmm.core.metrics import FloatArray
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded

_MEMORY = re.compile(r"process_memory|gpu_\d+\W(torch_)?memory")
_PARTS = 5
_ENDLESS = 2.0**80  # bytes; no machine has them
_POINTS = 200  # enough for a slope: 20,000 pairs


def growing_memory(
    recorded: Recorded, *, rate: float = 0.01, total: float = 0.2, least: int = 50
) -> Iterator[Anomaly]:
    """Memory of the process or a GPU that grows all the time: medium, high where it has doubled.

    Of ``system/process_memory``, ``system/gpu_{i}/memory`` and ``torch_memory``, in bytes, with
    ``least`` recorded values: the Theil-Sen slope is more than ``rate`` of the median per 100
    recorded values, the medians of five equal parts rise each time (by a twentieth of the whole
    rise at least, so that no single step does it), and the last is more than ``total`` above the
    first.
    """
    for series in series_of(recorded, _is_memory):
        memory = series.where((series.values > 0) & (series.values < _ENDLESS))
        if len(memory.values) < max(least, 2 * _PARTS):
            continue
        medians = np.array([np.median(part) for part in np.array_split(memory.values, _PARTS)])
        rise, level = medians[-1] - medians[0], float(np.median(memory.values))
        if rise <= total * medians[0]:
            continue
        slope = _slope(memory.values)
        if (np.diff(medians) < rise / 20).any() or 100 * slope <= rate * level:
            continue
        severity: Severity = "high" if rise > medians[0] else "medium"
        (episode,) = episodes(memory, np.ones(len(memory.values), dtype=np.bool_))
        text = (
            f"{series.key} grew from {_bytes(medians[0])} to {_bytes(medians[-1])}"
            f" {episode.when}, about {_bytes(100 * slope)} per 100 recorded steps, without a pause."
        )
        yield episode.anomaly("memory_growth", severity, (1 + total) * medians[0], text)


def _is_memory(info: KeyInfo) -> bool:
    return info.kind == SYSTEM.name and _MEMORY.fullmatch(info.site) is not None


def _slope(values: FloatArray) -> float:
    """The Theil-Sen slope per value: the median of the slopes of all pairs, of some points."""
    places = np.unique(np.linspace(0, len(values) - 1, _POINTS).astype(np.int64))
    first, second = np.triu_indices(len(places), 1)
    rises = values[places[second]] - values[places[first]]
    return float(np.median(rises / (places[second] - places[first])))


def _bytes(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


GROWTH_ENDS = (EndsWith("memory_growth", "high", _is_memory, any_finite),)
