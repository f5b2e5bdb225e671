"""Activations that are or become large."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import SEVERITIES, Anomaly, Severity, episodes, number
from tmm.analysis.ending import Ending, EndsWith, jumping
from tmm.analysis.recent import Newest
from tmm.analysis.robust import begun_suddenly, bridged, early_median, jumps
from tmm.analysis.series import is_metric, loss_unit, series_of
from tmm.core.keys import is_total_loss
from tmm.core.series_by_key import Recorded

_LARGE = 100.0
_TAILS = 1000.0
_FACTOR, _SCORE, _WINDOW, _LEAST = 10.0, 8.0, 50, 10
_has_size = is_metric("activation", "absmax", "rms")
_has_tails = is_metric("activation", "kurtosis")
_has_rms = is_metric("activation", "rms")
_WORDS = {"absmax": "largest value", "rms": "root mean square"}


def activation_outliers(
    recorded: Recorded,
    *,
    medium: float = _LARGE,
    high: float = 1000.0,
    growth: float = 4.0,
    kurtosis: float = _TAILS,
) -> Iterator[Anomaly]:
    """Outputs with large values.

    These are counted in units of the square root of a tenth of the first loss, where that is above
    10: outputs that have to reach targets of hundreds are as large. An ``absmax`` or ``rms``
    above ``medium`` is medium, above ``high`` high; one severity less where it has been above
    from the first recorded step on without growing to ``growth`` times the median of its first
    ten values, as the scale of a tensor. What falls to no less than half of ``medium`` in
    between is one episode. A ``kurtosis`` above ``kurtosis`` is medium: few elements carry
    everything (a normal distribution has 3).
    """
    unit = float(np.sqrt(loss_unit(recorded)))
    medium, high = unit * medium, unit * high
    for series in series_of(recorded, _has_size):
        sizes = series.finite()
        early = early_median(sizes.values)
        flagged = bridged(sizes.values > medium, sizes.values > medium / 2)
        for episode in episodes(sizes, flagged):
            severity: Severity = "high" if episode.value > high else "medium"
            limit = high if severity == "high" else medium
            text = (
                f"The {_WORDS[series.metric]} of the output of {series.site} reached"
                f" {number(episode.value)} {episode.when}, more than {number(limit)}"
            )
            if episode.places.start == 0 and episode.value < growth * early:
                severity = SEVERITIES[SEVERITIES.index(severity) - 1]
                text += "; it has been so from the first recorded step and has not grown since"
            yield episode.anomaly("activation_outlier", severity, limit, text + ".")
    for series in series_of(recorded, _has_tails):
        tails = series.finite()
        flagged = bridged(tails.values > kurtosis, tails.values > kurtosis / 2)
        for episode in episodes(tails, flagged):
            text = (
                f"The output of {series.site} has a kurtosis of {number(episode.value)}"
                f" {episode.when}: a few elements are far larger than the others."
            )
            yield episode.anomaly("activation_outlier", "medium", kurtosis, text)


def exploding_activations(
    recorded: Recorded,
    *,
    factor: float = _FACTOR,
    score: float = _SCORE,
    window: int = _WINDOW,
    least: int = _LEAST,
) -> Iterator[Anomaly]:
    """Outputs whose ``rms`` jumped: high.

    At least ``factor`` times the median of the ``window`` recorded values before (of ``least`` at
    the least), more than ``score`` spreads above it in decades. Half of that way it goes at once:
    outputs that begin small grow as far over some steps, when a training takes off.
    """
    for series in series_of(recorded, _has_rms):
        sizes = series.finite()
        jumped, usual = jumps(sizes.values, factor=factor, score=score, window=window, least=least)
        jumped = begun_suddenly(jumped, sizes.values, np.sqrt(factor))
        for episode in episodes(sizes, jumped):
            level = usual[episode.worst]
            text = (
                f"The root mean square of the output of {series.site} jumped to"
                f" {number(episode.value)} {episode.when}, {number(episode.value / level)} times"
                f" its median of the {min(episode.worst, window)} recorded steps before"
                f" ({number(level)})."
            )
            yield episode.anomaly("activation_explosion", "high", factor * level, text)


def _jumping(newest: Newest) -> Ending:
    return jumping(newest, factor=_FACTOR, score=_SCORE, window=_WINDOW, least=_LEAST)


OUTLIERS_END = (
    EndsWith("activation_outlier", "high", _has_size, Ending.above(_LARGE), None, is_total_loss),
    EndsWith("activation_outlier", "medium", _has_tails, Ending.above(_TAILS)),
)
EXPLOSIONS_END = (EndsWith("activation_explosion", "high", _has_rms, _jumping),)
