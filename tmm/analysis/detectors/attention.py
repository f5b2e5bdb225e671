"""Heads of attention that look at one key only, and logits that grow."""

from __future__ import annotations

from collections.abc import Iterator

from tmm.analysis.anomaly import Anomaly, Severity, episodes, number
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.recent import Newest
from tmm.analysis.robust import bridged, early_median, runs
from tmm.analysis.series import Series, is_of, series_of
from tmm.core.series_by_key import Recorded

_ENTROPY, _PART = 0.1, 0.2
_NORMALIZED = 0.02
_LOGIT, _FACTOR = 50.0, 4.0
_SINK = 0.95
_is_entropy = is_of("attention_entropy")
_is_normalized_entropy = is_of("attention_normalized_entropy")
_is_logit = is_of("attention_max_logit")
_is_sink = is_of("attention_sink_mass")


def collapsed_attention(
    recorded: Recorded,
    *,
    entropy: float = _ENTROPY,
    part: float = _PART,
    normalized: float = _NORMALIZED,
    sharp: float = 0.1,
    least: int = 5,
) -> Iterator[Anomaly]:
    """Heads whose entropy has collapsed, in ``least`` recorded steps in a row (or nearly so).

    An entropy below ``entropy`` nats and below ``part`` of the median of its first ten recorded
    values, or a normalized entropy below ``normalized`` (which is 0 to 1): medium, for heads that
    copy one token are like that; high where so many steps in a row are below ``sharp`` of that
    limit, at which hardly any gradient comes through. An entropy of exactly zero in all steps is
    that of a single key. After Zhai et al. 2023, arXiv 2303.06296.
    """
    limits = {"attention_entropy": entropy, "attention_normalized_entropy": normalized}
    for series in series_of(recorded, is_of(*limits)):
        entropies = series.finite()
        limit = limits[series.info.kind]
        early = early_median(entropies.values)
        if series.info.kind == "attention_entropy":
            limit = min(limit, part * early) if early > 0 else limit
            flagged = (entropies.values < limit) & (early > 0)
        else:
            flagged = (entropies.values < limit) & bool((entropies.values > 0).any())
        flagged = bridged(flagged, entropies.values < 2 * limit)
        for episode in episodes(entropies, flagged, badness=-entropies.values, least=least):
            values = entropies.values[episode.places]
            is_sharp = any(True for _ in runs(values < sharp * limit, least))
            severity: Severity = "high" if is_sharp else "medium"
            unit = " nats" if series.info.kind == "attention_entropy" else " of the possible"
            text = (
                f"The attention of {series.site} looks at almost one key only {episode.when}: its"
                f" entropy fell to {number(episode.value)}{unit}; in the first recorded steps it"
                f" was {number(early)}."
            )
            yield episode.anomaly("attention_collapse", severity, limit, text)


def growing_logits(
    recorded: Recorded, *, medium: float = _LOGIT, high: float = 100.0, factor: float = _FACTOR
) -> Iterator[Anomaly]:
    """Heads whose largest logit is above ``medium`` (medium) or ``high`` (high), and has grown.

    It has grown to at least ``factor`` times the median of its first ten recorded values (counted
    as 1 where that is less). Above half of ``medium`` it is still one episode. After Dehghani et
    al. 2023, arXiv 2302.05442.
    """
    for series in series_of(recorded, _is_logit):
        logits = series.finite()
        early = early_median(logits.values)
        flagged = (logits.values > medium) & (logits.values >= factor * max(early, 1.0))
        flagged = bridged(flagged, logits.values > medium / 2)
        for episode in episodes(logits, flagged):
            severity: Severity = "high" if episode.value > high else "medium"
            limit = high if severity == "high" else medium
            text = (
                f"The largest attention logit of {series.site} reached {number(episode.value)}"
                f" {episode.when}, more than {number(limit)}; in the first recorded steps it was"
                f" {number(early)}."
            )
            yield episode.anomaly("attention_logit_growth", severity, limit, text)


def attention_sinks(
    recorded: Recorded, *, mass: float = _SINK, early: float = 0.5, least: int = 5
) -> Iterator[Anomaly]:
    """Heads that came to give nearly all to the first key, in ``least`` recorded steps in a row.

    A ``sink_mass`` above ``mass`` where the median of the first ten values was below ``early``:
    medium. After Xiao et al. 2023, arXiv 2309.17453.
    """
    for series in series_of(recorded, _is_sink):
        masses = series.finite()
        first = early_median(masses.values)
        if not first < early:
            continue
        flagged = bridged(masses.values > mass, masses.values > mass - 0.1)
        for episode in episodes(masses, flagged, least=least):
            text = (
                f"The attention of {series.site} gives {number(100 * episode.value)} % to the first"
                f" key {episode.when}; in the first recorded steps it was"
                f" {number(100 * first)} %."
            )
            yield episode.anomaly("attention_sink", "medium", mass, text)


def _collapsed(newest: Newest) -> Ending:
    def is_low(series: Series) -> bool:
        early = early_median(series.finite().values)
        return bool(early > 0 and series.values[-1] < _PART * early)

    return Ending.where(newest, newest.values < _ENTROPY, is_low)


def _grown(newest: Newest) -> Ending:
    def is_high(series: Series) -> bool:
        early = early_median(series.finite().values)
        return bool(series.values[-1] >= _FACTOR * max(early, 1.0))

    return Ending.where(newest, newest.values > _LOGIT, is_high)


COLLAPSES_END = (
    EndsWith("attention_collapse", "high", _is_entropy, _collapsed),
    EndsWith("attention_collapse", "high", _is_normalized_entropy, Ending.below(_NORMALIZED)),
)
SINKS_END = (EndsWith("attention_sink", "medium", _is_sink, Ending.above(_SINK)),)
LOGITS_END = (EndsWith("attention_logit_growth", "high", _is_logit, _grown),)
