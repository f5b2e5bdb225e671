"""What shows that a tensor held NaN or infinity, and what only looks like it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from tmm.analysis.names import metric_of
from tmm.analysis.order import BACKWARD, GRADIENT, REST, Rank
from tmm.analysis.recorded import Recorded
from tmm.analysis.series import BoolArray, Series, series_of, skipped_steps
from tmm.layout import ATTENTION, KeyInfo
from tmm.metrics import METRIC_NAMES, FloatArray
from tmm.reader import StepArray

COUNTS = ("nan_count", "inf_count")
EXTREMES = ("absmax", "max", "min")
SILENT = ("std", "kurtosis", "cosine", "relative_norm", "effective_lr", "histogram")
"""Metrics that are NaN or infinite for finite tensors, too."""

_KNOWN = (*METRIC_NAMES, "l2", "l2norm", "exp_avg_norm", "exp_avg_sq_norm", "")


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
        return ranks[info.key][0] != REST and metric_of(info) not in SILENT

    skipped = skipped_steps(recorded)
    for series in series_of(recorded, counts):
        if ranks[series.key][0] in (BACKWARD, GRADIENT):
            series = series.without(skipped)
        tensor = (_family(series.info), series.site)
        if len(series.steps):
            tensors.setdefault(tensor, []).append(series)
    for metrics in tensors.values():
        if not all(map(_is_quiet, metrics)):
            yield _judge(metrics)


def _is_quiet(series: Series) -> bool:
    """Whether it has nothing to say; most have not, and are many."""
    if series.metric in COUNTS:
        return not (series.values > 0).any()
    return bool(np.isfinite(series.values).all())


def _judge(metrics: list[Series]) -> Evidence:
    steps = np.unique(np.concatenate([series.steps for series in metrics]))
    finite = _known_finite(metrics, steps)
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
    metric = series.metric
    bad: BoolArray = there & ~np.isfinite(values) & ~finite
    if metric in COUNTS:
        bad = there & (values > 0)
    elif metric in ("min", "max"):
        bad &= values != (np.inf if metric == "min" else -np.inf)  # that of nothing at all
    elif metric not in _KNOWN:
        known = there & np.isfinite(values)
        bad &= np.logical_or.accumulate(known)
    return bad


def _known_finite(metrics: list[Series], steps: StepArray) -> BoolArray:
    """At which steps a tensor is known to be finite, whatever sums of its squares say."""
    values = {series.metric: series.on(steps) for series in metrics}
    missing = np.full(len(steps), np.nan)
    nans, infinities, largest, maximum, minimum = (
        values.get(name, missing) for name in (*COUNTS, *EXTREMES)
    )
    by_counts: BoolArray = (nans == 0) & (infinities == 0)
    by_extremes: BoolArray = np.isfinite(largest) | (np.isfinite(maximum) & np.isfinite(minimum))
    finite: BoolArray = by_counts | by_extremes
    return finite


def _family(info: KeyInfo) -> str:
    return ATTENTION if info.kind.startswith(f"{ATTENTION}_") else info.kind
