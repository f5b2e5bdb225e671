"""Inputs of the model that are unlike those before, or of a scale that layers are not made for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, episodes, number
from tmm.analysis.ending import Ending, EndsWith, any_finite
from tmm.analysis.recent import Newest
from tmm.analysis.robust import NORMAL, early_median, median
from tmm.analysis.series import is_metric, named, series_of
from tmm.core.families import MODEL_INPUT
from tmm.core.keys import STARTED, key_of
from tmm.core.series_by_key import Recorded

_is_size = is_metric(MODEL_INPUT.name, "rms", "absmax", "zero_fraction")
_is_scale = is_metric(MODEL_INPUT.name, "mean", "rms")
_is_mark = is_metric(MODEL_INPUT.name, "rms")
_WINDOW = 50


def strange_inputs(
    recorded: Recorded,
    *,
    factor: float = 5.0,
    absmax: float = 50.0,
    score: float = 8.0,
    empty: float = 0.999,
    least: int = 3,
) -> Iterator[Anomaly]:
    """Batches that are far larger or smaller than those before, or nothing but zeros: high.

    The ``rms`` is ``factor`` times the median of up to 50 recorded values before (of ``least`` at
    the least), or that part of it, and ``score`` spreads away in decades; the ``absmax`` is
    ``absmax`` times it. A share of zeros of ``empty`` is nothing, where it was below 0.9.
    """
    told: dict[str, set[int]] = {}
    for series in series_of(recorded, _is_size):
        values, steps = series.values, series.steps
        is_share = series.metric == "zero_fraction"
        flagged = np.zeros(len(values), dtype=np.bool_)
        usual = np.full(len(values), np.nan)
        for place in range(least, len(values)):
            before = values[max(0, place - _WINDOW) : place]
            before = before[np.isfinite(before) & ~flagged[max(0, place - _WINDOW) : place]]
            if len(before) < least or not np.isfinite(values[place]):
                continue
            usual[place] = median(before)
            if is_share:
                flagged[place] = values[place] >= empty and usual[place] < 0.9
            elif values[place] > 0 and usual[place] > 0:
                logs = np.log10(before[before > 0])
                spread = max(NORMAL * float(np.median(np.abs(logs - np.median(logs)))), 0.02)
                move = np.log10(values[place]) - np.log10(usual[place])
                limit = factor if series.metric == "rms" else absmax
                is_far = abs(move) if series.metric == "rms" else move
                flagged[place] = is_far >= np.log10(limit) and is_far > score * spread
        fresh = flagged & ~np.isin(steps, list(told.get(series.site, ())))
        told.setdefault(series.site, set()).update(steps[flagged].tolist())
        for episode in episodes(series, fresh, badness=np.where(fresh, values, -np.inf)):
            level = usual[episode.worst]
            what = (
                f"is nothing but zeros {episode.when}"
                if is_share
                else f"has a {_WORDS[series.metric]} of {number(episode.value)} {episode.when}"
            )
            text = (
                f"The input {series.site} {what}; before, it was {number(level)}: a corrupt batch?"
            )
            yield episode.anomaly("input_jump", "high", min(factor * level, 1e308), text)


_WORDS = {"rms": "root mean square", "absmax": "largest value"}


def input_scales(recorded: Recorded, *, medium: float = 30.0) -> Iterator[Anomaly]:
    """Real inputs whose mean or root mean square is above ``medium`` from the first step: medium.

    It is the median of the first ten recorded values that counts.
    """
    for series in series_of(recorded, _is_mark):
        if named(recorded, key_of(MODEL_INPUT.name, series.site, "nan_count")) is None:
            continue  # integers, such as tokens
        size = early_median(series.finite().values)
        if size > medium:
            step = int(series.steps[0])
            text = (
                f"The input {series.site} has a root mean square of {number(size)} from the first"
                " recorded step: layers are made for inputs of about 1 (is it not normalised?)."
            )
            severity: Severity = "medium"
            yield Anomaly(
                *("input_scale", severity, step, int(series.steps[-1]), series.key, series.site),
                *(size, medium, text),
            )


def repeated_data(recorded: Recorded, *, least: int = 3) -> Iterator[Anomaly]:
    """Batches after a resume that are those from the beginning of the run: medium.

    The inputs of at least ``least`` recorded steps from the one at which the run was resumed are,
    in mean and root mean square, exactly those of the first recorded ones, which were others than
    those in between.
    """
    starts = named(recorded, STARTED)
    if starts is None:
        return
    for series in series_of(recorded, _is_mark):
        mean = named(recorded, key_of(MODEL_INPUT.name, series.site, "mean"))
        if mean is None:
            continue
        marks = list(zip(series.values, mean.on(series.steps), strict=True))
        for start in starts.steps[1:]:
            place = int(np.searchsorted(series.steps, start))
            again = marks[place:][:place]
            same = _common(marks, again)
            # Data that repeat anyway, such as one batch, say nothing.
            if same >= least and len(set(marks[:place])) == place:
                flagged = np.zeros(len(marks), dtype=np.bool_)
                flagged[place : place + same] = True
                (episode,) = episodes(series, flagged)
                text = (
                    f"The input {series.site} is, {episode.when}, that of the first steps of the"
                    f" run again, from step {int(series.steps[0])} on: the data began anew when"
                    " the run was resumed."
                )
                yield episode.anomaly("data_repeated", "medium", 0.0, text)


def _common(first: list[tuple[float, float]], second: list[tuple[float, float]]) -> int:
    """How many marks agree from the beginning on."""
    count = 0
    for left, right in zip(first, second, strict=False):
        if left != right or not np.isfinite(left).all():
            break
        count += 1
    return count


def _may_be_strange(newest: Newest) -> Ending:
    possible = np.zeros(len(newest), dtype=np.bool_)
    for place in range(len(newest)):
        values = newest.series(place).values[:-1]
        near = median(values) if len(values) else np.nan
        value = newest.values[place]
        possible[place] = value > 2 * near or value < near / 2 or value >= 0.999
    return Ending.of(newest, possible)


def _site(info: object) -> str:
    return info.site  # type: ignore[attr-defined, no-any-return]


def _in_the_beginning(newest: Newest) -> Ending:
    few = bool(len(newest)) and len(newest.series(0).values) == 1
    return Ending.of(newest, np.full(len(newest), few, dtype=np.bool_))


def _all_inputs(info: object) -> bool:
    return info.kind == MODEL_INPUT.name or info.key == STARTED  # type: ignore[attr-defined, no-any-return]


JUMPS_END = (EndsWith("input_jump", "high", _is_size, _may_be_strange, _site),)
SCALE_ENDS = (EndsWith("input_scale", "medium", _is_mark, _in_the_beginning, _site, _all_inputs),)
REPEATS_END = (EndsWith("data_repeated", "medium", _is_mark, any_finite, _site, _all_inputs),)
