"""Each series in a few numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tmm.analysis.series import Series, series_of
from tmm.core.metrics import FloatArray
from tmm.core.series_by_key import Recorded


@dataclass(frozen=True)
class KeySummary:
    """One key: ``count`` values, of which ``nonfinite`` are NaN or infinite.

    The others are about the finite ones, None where there are none; of equal extremes the first.
    """

    key: str
    count: int
    nonfinite: int
    first: float | None = None
    last: float | None = None
    minimum: float | None = None
    minimum_step: int | None = None
    maximum: float | None = None
    maximum_step: int | None = None
    mean: float | None = None


def summarize(recorded: Recorded, pattern: str | None = None) -> tuple[KeySummary, ...]:
    """A summary of each key that ``pattern`` matches (`re.match`), in the order of execution.

    Histograms are left out. Raises ValueError for what is no regular expression.
    """
    chosen = set(recorded.keys(pattern))
    return tuple(_summary(series) for series in series_of(recorded, lambda i: i.key in chosen))


def _summary(series: Series) -> KeySummary:
    finite = series.finite()
    steps, values, count = finite.steps, finite.values, len(series.values)
    if not len(values):
        return KeySummary(series.key, count, count)
    lowest, highest = int(np.argmin(values)), int(np.argmax(values))
    return KeySummary(
        key=series.key,
        count=count,
        nonfinite=count - len(values),
        first=float(values[0]),
        last=float(values[-1]),
        minimum=float(values[lowest]),
        minimum_step=int(steps[lowest]),
        maximum=float(values[highest]),
        maximum_step=int(steps[highest]),
        mean=_mean(values),
    )


def _mean(values: FloatArray) -> float:
    """The mean, also of numbers whose sum would overflow."""
    largest = float(np.abs(values).max())
    return float(np.mean(values / largest)) * largest if largest > 1e300 else float(values.mean())
