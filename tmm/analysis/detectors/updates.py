"""Updates of parameters that are too large, or nothing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, episodes, number
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.robust import bridged
from tmm.analysis.series import Series, is_metric, series_of
from tmm.core.series_by_key import Recorded

_LARGE = 0.1
_SMALL = 1e-8
_is_size = is_metric("update", "relative_norm")


def large_updates(
    recorded: Recorded,
    *,
    medium: float = _LARGE,
    high: float = 0.3,
    critical: float = 1.0,
    warmup: int = 5,
    least: int = 5,
) -> Iterator[Anomaly]:
    """Updates that are a large part of their weight, after the first ``warmup`` recorded steps.

    A ``relative_norm`` above ``medium`` in ``least`` recorded steps in a row (above half of it in
    between) is medium, high where the largest of them is above ``high``; a single one above
    ``critical`` is critical. Biases are left out, as they move about zero, and so are weights that
    begin at zero (their first relative norm is above 1) until it has fallen to ``medium``.
    """
    for series in series_of(recorded, _is_size):
        if "bias" in series.site.rpartition(".")[2]:
            continue
        sizes = series.where(np.arange(len(series.steps)) >= _settled(series, medium, warmup))
        sizes = sizes.finite()
        flagged = bridged(sizes.values > medium, sizes.values > medium / 2)
        for episode in episodes(sizes, flagged):
            if episode.count < least and episode.value <= critical:
                continue
            limits: tuple[tuple[Severity, float], ...]
            limits = (("critical", critical), ("high", high), ("medium", medium))
            severity, limit = next(item for item in limits if episode.value > item[1])
            text = (
                f"A step changed {series.site} by up to {number(100 * episode.value)} % of its norm"
                f" {episode.when}, more than {number(100 * limit)} %: is the learning rate too"
                " high?"
            )
            yield episode.anomaly("update_large", severity, limit, text)


def small_updates(
    recorded: Recorded, *, limit: float = _SMALL, least: int = 10
) -> Iterator[Anomaly]:
    """Parameters that hardly change: low.

    A ``relative_norm`` below ``limit`` in ``least`` recorded steps in a row (below ten times that
    in between); 1e-8 is less than float32 can hold of one element.
    """
    for series in series_of(recorded, _is_size):
        sizes = series.finite()
        flagged = bridged(sizes.values < limit, sizes.values < 10 * limit)
        for episode in episodes(sizes, flagged, badness=-sizes.values, least=least):
            text = (
                f"{series.site} hardly changed {episode.when}: by about {number(limit)} of its norm"
                f" or less in each of {episode.count} recorded steps."
            )
            yield episode.anomaly("update_small", "low", limit, text)


def _settled(series: Series, medium: float, warmup: int) -> int:
    """The place from which on a weight is judged."""
    values = series.values
    if len(values) and not values[0] <= 1.0:
        below = np.flatnonzero(values <= medium)
        return max(warmup, int(below[0])) if len(below) else len(values)
    return warmup


LARGE_END = (EndsWith("update_large", "critical", _is_size, Ending.above(_LARGE)),)
SMALL_END = (EndsWith("update_small", "low", _is_size, Ending.below(_SMALL)),)
