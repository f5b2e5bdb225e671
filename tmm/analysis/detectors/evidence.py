"""What shows that a tensor held NaN or infinity, and what only looks like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tmm.analysis.order import Rank
from tmm.analysis.recent import RecentSeries
from tmm.analysis.series import BoolArray, Series, series_of, skipped_steps
from tmm.core.families import ATTENTION, Phase
from tmm.core.keys import metric_of
from tmm.core.metrics import DERIVED_METRICS, METRIC_NAMES, UNDEFINED, FloatArray
from tmm.core.records import KeyInfo, StepArray
from tmm.core.series_by_key import Recorded

COUNTS = ("nan_count", "inf_count")
EXTREMES = ("absmax", "max", "min")

_KNOWN = (*METRIC_NAMES, *DERIVED_METRICS, "")


@dataclass(frozen=True, eq=False)
class Evidence:
    """The key that shows it best for one tensor, and at which of its steps, shape (n,)."""

    series: Series
    flagged: BoolArray
    is_always_infinite: bool

    @property
    def badness(self) -> FloatArray:
        """What is worst: the largest count, else the first value."""
        if self.series.metric in COUNTS:
            return self.series.values
        return -np.arange(len(self.flagged), dtype=np.float64)

    @property
    def value(self) -> float:
        """The value at the first flagged step."""
        return float(self.series.values[np.argmax(self.flagged)])


def evidence(recorded: Recorded, ranks: Mapping[str, Rank]) -> Iterator[Evidence]:
    """For each tensor, loss and recorded value that may not have been finite: where it was not."""
    tensors: dict[tuple[str, str], list[Series]] = {}

    def counts(info: KeyInfo) -> bool:
        return ranks[info.key][0] != Phase.REST and metric_of(info) not in UNDEFINED

    skipped = skipped_steps(recorded)
    for series in series_of(recorded, counts):
        if ranks[series.key][0] in (Phase.BACKWARD, Phase.GRADIENT):
            series = series.without(skipped)
        tensor = tensor_of(series.info)
        if len(series.steps):
            tensors.setdefault(tensor, []).append(series)
    for metrics in tensors.values():
        if not all(map(_is_quiet, metrics)):
            yield _judge(metrics)


@dataclass(frozen=True)
class NewestEvidence:
    """A tensor that is not finite by its newest values: its keys, and those that show it.

    ``may_be_harmless`` tells that it is the output of a module, and shows infinities only.
    """

    tensor: tuple[str, str]
    keys: tuple[str, ...]
    flagged: tuple[str, ...]
    may_be_harmless: bool


def newest_evidence(recent: RecentSeries) -> list[NewestEvidence]:
    """What `evidence` says of the newest values alone."""
    newest, counts = recent.newest(_may_count), recent.newest(_is_count)
    if np.isfinite(newest.values).all() and not (counts.values > 0).any():
        return []
    infos = [newest.info(place) for place in range(len(newest))]
    metrics = list(map(metric_of, infos))
    suspect = ~np.isfinite(newest.values)
    suspect |= (newest.values > 0) & np.array([metric in COUNTS for metric in metrics])
    skips = newest.skipped_within(1)
    tensors: dict[tuple[str, str], list[int]] = {}
    for place, info in enumerate(infos):
        part = recent.ranks[info.key][0]
        if part != Phase.REST and not (skips and part in (Phase.BACKWARD, Phase.GRADIENT)):
            tensors.setdefault(tensor_of(info), []).append(place)
    alike: dict[tuple[str, ...], list[list[int]]] = {}
    for places in tensors.values():
        if suspect[places].any():
            alike.setdefault(tuple(metrics[place] for place in places), []).append(places)
    found = []
    for names, rows in alike.items():
        values = newest.values[np.array(rows)]  # of shape (tensors, metrics)
        finite = known_finite(dict(zip(names, values.T, strict=True)))
        shown = [shows_nonfinite(*pair, finite) for pair in zip(names, values.T, strict=True)]
        nans = np.isnan(values).any(axis=1)
        for name, column in zip(names, values.T, strict=True):
            nans |= (name == "nan_count") & (column > 0)
        for places, flags, has_nan in zip(rows, np.array(shown).T, nans, strict=True):
            flagged = [p for p, flag in zip(places, flags, strict=True) if flag]
            flagged = [p for p in flagged if metrics[p] in _KNOWN or _was_finite(newest.series(p))]
            if flagged:
                info = infos[places[0]]
                found.append(
                    NewestEvidence(
                        tensor_of(info),
                        tuple(infos[place].key for place in places),
                        tuple(infos[place].key for place in flagged),
                        recent.ranks[info.key][0] == Phase.FORWARD and not has_nan,
                    )
                )
    return found


def tensor_of(info: KeyInfo) -> tuple[str, str]:
    """What keys of one tensor have in common."""
    is_of_attention = ATTENTION.begins(info.kind)
    return ATTENTION.name if is_of_attention else info.kind, info.site


def _was_finite(series: Series) -> bool:
    return bool(np.isfinite(series.values).any())


def _is_count(info: KeyInfo) -> bool:
    return metric_of(info) in COUNTS


def _may_count(info: KeyInfo) -> bool:
    return metric_of(info) not in UNDEFINED


def _is_quiet(series: Series) -> bool:
    """Whether it has nothing to say; most have not, and are many."""
    if series.metric in COUNTS:
        return not (series.values > 0).any()
    return bool(np.isfinite(series.values).all())


def _judge(metrics: list[Series]) -> Evidence:
    steps = np.unique(np.concatenate([series.steps for series in metrics]))
    finite = known_finite({series.metric: series.on(steps) for series in metrics})
    flags = {series.key: _flags(series, steps, finite) for series in metrics}
    anywhere = np.logical_or.reduce(list(flags.values()))
    first = int(np.argmax(anywhere))
    # The tensor's evidence is told by the key that shows it in its first step: counts, then others.
    best = max(metrics, key=lambda series: (flags[series.key][first], series.metric in COUNTS))
    here = np.isin(steps, best.steps)
    nans = [np.isnan(s.values) | ((s.metric == "nan_count") & (s.values > 0)) for s in metrics]
    always = bool(len(steps) and anywhere.all())
    infinite = always and not any(part.any() for part in nans)
    return Evidence(best, anywhere[here], infinite)


def _flags(series: Series, steps: StepArray, finite: BoolArray) -> BoolArray:
    """At which of ``steps`` the series shows it."""
    values = series.on(steps)
    there = np.isin(steps, series.steps)
    bad = there & shows_nonfinite(series.metric, values, finite)
    if series.metric not in _KNOWN:
        known = there & np.isfinite(values)
        bad &= np.logical_or.accumulate(known)
    return bad


def shows_nonfinite(metric: str, values: FloatArray, finite: BoolArray) -> BoolArray:
    """Which values of a metric come of tensors that are not finite; ``finite`` are known to be."""
    if metric in COUNTS:
        return values > 0
    bad: BoolArray = ~np.isfinite(values) & ~finite
    if metric in ("min", "max"):
        bad &= values != (np.inf if metric == "min" else -np.inf)  # that of nothing at all
    return bad


def known_finite(values: Mapping[str, FloatArray]) -> BoolArray:
    """Which tensors are finite by their metrics, (n,) each, whatever sums of squares say."""
    missing = np.full(len(next(iter(values.values()))), np.nan)
    nans, infinities, largest, maximum, minimum = (
        values.get(name, missing) for name in (*COUNTS, *EXTREMES)
    )
    by_counts: BoolArray = (nans == 0) & (infinities == 0)
    by_extremes: BoolArray = np.isfinite(largest) | (np.isfinite(maximum) & np.isfinite(minimum))
    finite: BoolArray = by_counts | by_extremes
    return finite
