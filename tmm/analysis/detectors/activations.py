"""Activations that are or become large."""

from __future__ import annotations

from collections.abc import Iterator

from tmm.analysis.anomaly import SEVERITIES, Anomaly, Severity, episodes, number
from tmm.analysis.recorded import Recorded
from tmm.analysis.robust import bridged, early_median, jumps
from tmm.analysis.series import metrics_of

_WORDS = {"absmax": "largest value", "rms": "root mean square"}


def activation_outliers(
    recorded: Recorded,
    *,
    medium: float = 100.0,
    high: float = 1000.0,
    growth: float = 4.0,
    kurtosis: float = 1000.0,
) -> Iterator[Anomaly]:
    """Outputs with large values.

    An ``absmax`` or ``rms`` above ``medium`` is medium, above ``high`` high; one severity less
    where it has been above from the first recorded step on without growing to ``growth`` times
    the median of its first ten values, as the scale of a tensor. What falls to no less than half of
    ``medium`` in between is one episode. A ``kurtosis`` above ``kurtosis`` is medium: few elements
    carry everything (a normal distribution has 3).
    """
    for series in metrics_of(recorded, "activation", "absmax", "rms"):
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
    for series in metrics_of(recorded, "activation", "kurtosis"):
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
    factor: float = 10.0,
    score: float = 8.0,
    window: int = 50,
    least: int = 10,
) -> Iterator[Anomaly]:
    """Outputs whose ``rms`` jumped: high.

    At least ``factor`` times the median of the ``window`` recorded values before (of ``least`` at
    the least), more than ``score`` spreads above it in decades.
    """
    for series in metrics_of(recorded, "activation", "rms"):
        sizes = series.finite()
        jumped, usual = jumps(sizes.values, factor=factor, score=score, window=window, least=least)
        for episode in episodes(sizes, jumped):
            level = usual[episode.worst]
            text = (
                f"The root mean square of the output of {series.site} jumped to"
                f" {number(episode.value)} {episode.when}, {number(episode.value / level)} times"
                f" its median of the {min(episode.worst, window)} recorded steps before"
                f" ({number(level)})."
            )
            yield episode.anomaly("activation_explosion", "high", factor * level, text)
