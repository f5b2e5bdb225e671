"""How fast a run goes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from tmm.core.keys import system_key
from tmm.views.live.held_run import KnownSeries

STEP_SECONDS = system_key("step_seconds")
PER_SECOND = MappingProxyType(
    {unit: system_key(f"{unit}_per_second") for unit in ("samples", "tokens")}
)
RATE_KEYS = (STEP_SECONDS, *PER_SECOND.values())
"""What `recorded_rates` reads."""

_RECENT = 20  # recorded steps
_SIGHTINGS = 20
_LEAST_SECONDS = 10.0  # between sightings, which are a second or so too late


def recorded_rates(series: Mapping[str, KnownSeries]) -> dict[str, float]:
    """Steps, samples and tokens per second of the newest 20 recorded steps, as far as known.

    They are sums over sums of time. Where steps in between were not recorded, whose times are
    therefore not known, there are no steps per second, and the others are of the recorded ones.
    """
    if STEP_SECONDS not in series or series[STEP_SECONDS].is_histogram:
        return {}
    known = series[STEP_SECONDS]
    steps, seconds = known.steps[-_RECENT:], known.values[-_RECENT:]
    total = float(seconds.sum())
    if not total > 0:
        return {}
    rates = {"steps": len(steps) / total} if (np.diff(steps) == 1).all() else {}
    for unit, key in PER_SECOND.items():
        if key in series:
            of, per_second = series[key].steps[-_RECENT:], series[key].values[-_RECENT:]
            both, place, other = np.intersect1d(of, steps, return_indices=True)
            if len(both):
                time_of = seconds[other]
                rates[unit] = float((per_second[place] * time_of).sum() / time_of.sum())
    return rates


class Sightings:
    """The moments at which new steps were seen, for runs that do not record how long steps take."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=_SIGHTINGS)

    def see(self, step: int) -> None:
        """Note the newest step now."""
        if not self._seen or self._seen[-1][1] != step:
            self._seen.append((time.monotonic(), step))

    def steps_per_second(self) -> float | None:
        """Steps per second; None before there is enough time between sightings."""
        if not self._seen:
            return None
        (since, first), (until, last) = self._seen[0], self._seen[-1]
        if until - since < _LEAST_SECONDS or last <= first:
            return None
        return (last - first) / (until - since)
