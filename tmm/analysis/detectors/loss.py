"""Losses that spike, drop, diverge or stand still."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tmm.analysis.anomaly import Anomaly, Severity, episodes, number
from tmm.analysis.ending import EndsWith, any_finite
from tmm.analysis.robust import NORMAL, before, bridged, early_median, median
from tmm.analysis.series import Series, series_of
from tmm.core.keys import is_loss, is_total_loss
from tmm.core.metrics import FloatArray
from tmm.core.series_by_key import Recorded

_NEAR = 10  # values before that say where the loss is now
_LEAST_NEAR = 3
_FIVE = 5  # values whose median says where a diverging loss is
_FEW = 5.0  # see `_usual`
_ENDLESS = 1e100  # differences of larger numbers overflow, and say no more


def loss_spikes(
    recorded: Recorded,
    *,
    medium: float = 6.0,
    single: float = 8.0,
    high: float = 15.0,
    window: int = 50,
    least: int = 10,
    floor: float = 0.02,
    part: float = 0.15,
) -> Iterator[Anomaly]:
    """Losses far above those before.

    The rise is that above the median of the 10 values before, on a logarithmic scale where a loss
    is always positive. It is compared with the rises of the ``window`` recorded values before:
    more than ``medium`` of their spreads (1.4826 times the median absolute deviation) above
    their median is medium, more than ``high`` high. A value alone has to be more than
    ``single`` above it, for noise has long tails, but seldom twice in a row. The spread is
    ``floor`` of the loss at least, so that a jump after a constant loss counts; the first
    ``least`` values are not judged. Where less than ``part`` is left of the size that the loss
    had at first, a rise has to be of that size.
    """
    for series in series_of(recorded, is_loss):
        losses = series.finite()
        values, smallest = _scale(losses, window, floor)
        near, _ = before(values, _NEAR, _LEAST_NEAR)
        usual, spread = _usual(values - near, window, least - _LEAST_NEAR, smallest)
        scores = (values - near - usual) / spread
        levels = np.exp(near.clip(max=700.0)) if _is_positive(losses) else near
        with np.errstate(over="ignore", invalid="ignore"):
            asked = part * abs(early_median(losses.values))
            is_large = (losses.values - levels > asked) | (np.abs(levels) > asked)
        flagged = bridged((scores > medium) & is_large, scores > 0.75 * medium)
        for episode in episodes(losses, flagged, badness=scores):
            place = episode.worst
            if episode.count == 1 and not scores[place] > single:
                continue
            severity: Severity = "high" if scores[place] > high else "medium"
            asked = high if severity == "high" else medium
            limit, level = near[place] + usual[place] + asked * spread[place], near[place]
            if _is_positive(losses):
                limit, level = np.exp(min(limit, 700.0)), np.exp(level)
            text = (
                f"{series.key} rose to {number(episode.value)} {episode.when} from about"
                f" {number(level)}: {number(scores[place])} times as far as it usually varies."
            )
            yield episode.anomaly("loss_spike", severity, limit, text)


def loss_drops(
    recorded: Recorded,
    *,
    factor: float = 2.0,
    score: float = 8.0,
    window: int = 50,
    least: int = 10,
    floor: float = 0.02,
    part: float = 0.1,
) -> Iterator[Anomaly]:
    """Losses that fall all at once, as by a mask that hides every target: medium.

    Below the lowest of the 10 values before by more than a factor (for losses that are not always
    positive: by more than the part of the usual size that this is), and by more than ``score``
    spreads of such steps. What falls step by step does not count, however fast, nor does less than
    ``part`` of the size that the loss had at first, as where hardly anything is left of it.
    """
    for series in series_of(recorded, is_loss):
        losses = series.finite()
        values, smallest = _scale(losses, window, floor)
        falls = _lowest_before(values, _NEAR) - values
        usual, spread = _usual(falls, window, least - _LEAST_NEAR, smallest)
        far = np.log(factor) if _is_positive(losses) else (1 - 1 / factor) * smallest / floor
        scores = (falls - usual) / spread
        with np.errstate(over="ignore"):
            drops = _lowest_before(losses.values, _NEAR) - losses.values
        far_enough = drops > part * abs(early_median(losses.values))
        flagged = (scores > score) & (falls > far) & far_enough
        for episode in episodes(losses, flagged, badness=scores):
            level = float(losses.values[max(episode.worst - _NEAR, 0) : episode.worst].min())
            text = (
                f"{series.key} fell to {number(episode.value)} {episode.when}; the lowest of the"
                f" {min(episode.worst, _NEAR)} recorded values before was {number(level)}. So"
                " sudden a fall is rarely learning."
            )
            yield episode.anomaly("loss_drop", "medium", level, text)


def loss_divergence(
    recorded: Recorded, *, factor: float = 3.0, critical: float = 1000.0, score: float = 4.0
) -> Iterator[Anomaly]:
    """The loss as a whole, above where it began: high, and critical beyond ``critical`` times.

    The median of five recorded values in a row is more than ``factor`` times the first value (above
    it by that part of its size, where it is negative; not judged where it is 0), and above it by
    more than ``score`` times the noise, which is estimated from differences. Terms of a loss, such
    as ``kl_loss``, may grow.
    """
    for series in series_of(recorded, is_total_loss):
        losses = series.finite()
        values = losses.values.clip(-_ENDLESS, _ENDLESS)
        if len(values) < _FIVE or abs(values[0]) < 1 / _ENDLESS:
            continue
        first = float(values[0])
        levels = np.full(len(values), np.nan)
        levels[_FIVE - 1 :] = np.median(sliding_window_view(values, _FIVE), axis=1)
        limit = first + (factor - 1) * abs(first)
        if first > 0:
            noise = _noise(np.log(np.maximum(values, 1e-3 * first)))
            usual = first * np.exp(min(score * noise, 400.0))
        else:
            usual = first + score * _noise(values)
        found = levels > max(limit, usual)
        above = found.copy()
        for ahead in range(1, _FIVE):  # the five values begin before the place of their median
            above[:-ahead] |= found[ahead:] & (values[:-ahead] > limit)
        for episode in episodes(losses, bridged(above, levels > (first + limit) / 2)):
            is_far = episode.value - first > critical * abs(first)
            severity: Severity = "critical" if is_far else "high"
            text = (
                f"{series.key} stayed above {number(limit)} {episode.when}, up to"
                f" {number(episode.value)}; training began at {number(first)}."
            )
            yield episode.anomaly("loss_divergence", severity, limit, text)


def loss_plateaus(
    recorded: Recorded, *, window: int = 200, tolerance: float = 0.01
) -> Iterator[Anomaly]:
    """A loss that has come to rest: low, as it may have been learned.

    The medians of the four quarters of the last ``window`` recorded values differ by no more than
    ``tolerance`` of their size. Shorter series are not judged.
    """
    for series in series_of(recorded, is_loss):
        losses = series.finite()
        if len(losses.values) < max(window, 4):
            continue
        recent = losses.values[-window:]
        medians = [median(part) for part in np.array_split(recent, 4)]
        level = abs(median(recent))
        if max(medians) - min(medians) <= tolerance * level:
            flagged = np.arange(len(losses.values)) >= len(losses.values) - window
            (episode,) = episodes(losses, flagged, badness=-losses.values)
            text = (
                f"{series.key} has stayed at {number(median(recent))} for the last"
                f" {window} recorded values, since step {episode.first_step}."
            )
            yield episode.anomaly("loss_plateau", "low", tolerance * level, text)


def _is_positive(losses: Series) -> bool:
    return bool((losses.values > 0).all())


def _scale(losses: Series, window: int, floor: float) -> tuple[FloatArray, FloatArray]:
    """The values on the scale that they are judged on, and the least spread for each, both (n,)."""
    if _is_positive(losses):
        return np.log(losses.values), np.full(len(losses.values), floor)
    values = losses.values.clip(-_ENDLESS, _ENDLESS)
    sizes, _ = before(np.abs(values), window, 1)
    return values, np.maximum(floor * np.nan_to_num(sizes), 1e-12)


def _usual(
    moves: FloatArray, window: int, least: int, smallest: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Median and spread of the moves before each; NaN where there are too few.

    The median counts where it is above zero only: a fall that ends is no rise. A spread of few
    values is itself uncertain, and is taken to be larger: 1 + 5/n times, of n values.
    """
    known = np.isfinite(moves)
    usual, spread = np.full(len(moves), np.nan), np.full(len(moves), np.nan)
    center, deviation = before(moves[known], window, least)
    counts = np.arange(len(center)).clip(1, window)
    usual[known] = np.maximum(center, 0.0)
    spread[known] = np.maximum(deviation * (1 + _FEW / counts), smallest[known])
    return usual, spread


def _lowest_before(values: FloatArray, count: int) -> FloatArray:
    """The lowest of up to ``count`` values before each; NaN for the first."""
    if not len(values):
        return values
    padded = np.concatenate([np.full(count, np.inf), values])
    lowest = sliding_window_view(padded, count)[: len(values)].min(axis=1)
    return np.where(np.isinf(lowest), np.nan, lowest)


def _noise(values: FloatArray) -> float:
    """The standard deviation about a trend, from the differences of neighbours."""
    differences = np.abs(np.diff(values))
    return float(NORMAL * np.median(differences) / np.sqrt(2)) if len(differences) else 0.0


SPIKES_END = (EndsWith("loss_spike", "high", is_loss, any_finite),)
DROPS_END = (EndsWith("loss_drop", "medium", is_loss, any_finite),)
DIVERGENCES_END = (EndsWith("loss_divergence", "critical", is_total_loss, any_finite),)
PLATEAUS_END = (EndsWith("loss_plateau", "low", is_loss, any_finite),)
