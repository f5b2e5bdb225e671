"""Weights that something else than learning changes: decay, and what writes to them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, episodes, number
from tmm.analysis.detectors.learning_rate import ALL
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.layers import (
    begins_at_one,
    first_moves,
    is_bias,
    is_parameter,
    is_update,
    joined,
)
from tmm.analysis.recent import Newest
from tmm.analysis.robust import medians
from tmm.analysis.series import Series, named, series_of
from tmm.core.keys import key_of
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded

_JUMP = 3.0


def decaying_parameters(
    recorded: Recorded,
    *,
    medium: float = 0.5,
    low: float = 0.7,
    shared: float = 0.8,
    begun: float = 0.9,
    least: int = 10,
) -> Iterator[Anomaly]:
    """Weights, or gains of normalisations, that all shrink together, as by a decay.

    The median of their root mean squares is below ``medium`` of the first recorded (medium) or
    below ``low`` (low), and ``shared`` of them are below 0.8 of it. Learning makes some smaller,
    and others larger. It is dated to where the median fell below ``begun``.
    """
    moves = first_moves(recorded)
    groups: dict[bool, list[Series]] = {True: [], False: []}
    for series in series_of(recorded, is_parameter):
        sizes = series.finite()
        if len(sizes.values) >= least and sizes.values[0] > 0 and not is_bias(sizes.site):
            groups[begins_at_one(sizes, moves.get(sizes.site, 0.0))].append(sizes)
    for is_gain, some in groups.items():
        if len(some) < 2:
            continue
        steps, values = joined(some)
        with np.errstate(over="ignore", invalid="ignore"):
            parts = values / np.array([[sizes.values[0]] for sizes in some])
        middle, last = medians(parts.T), parts[:, -1]
        last = last[np.isfinite(last)]
        if not (middle[-1] < low and len(last) and (last < 0.8).mean() >= shared):
            continue
        severity: Severity = "medium" if middle[-1] < medium else "low"
        begins = int(np.flatnonzero(middle >= begun)[-1]) + 1 if (middle >= begun).any() else 0
        info = some[0].info
        site = some[0].site.rpartition(".")[0] if is_gain else ALL
        info = KeyInfo(info.key, info.kind, site, info.position, "")
        flagged = np.arange(len(steps)) >= begins
        (episode,) = episodes(Series(info, steps, middle), flagged, badness=-middle)
        what = "gains of normalisations" if is_gain else "weights"
        text = (
            f"All {what} shrink {episode.when}, to {number(100 * float(middle[-1]))} % of their"
            f" first size in the median of {len(some)}: "
            + (
                "they are decayed, which is rarely meant."
                if is_gain
                else "is the decay too strong?"
            )
        )
        yield episode.anomaly("parameter_decay", severity, medium, text)


def jumping_parameters(recorded: Recorded, *, factor: float = _JUMP) -> Iterator[Anomaly]:
    """Parameters that something else than their optimizer has written to: high.

    The root mean square is ``factor`` times that at the recorded step before, or that part of it
    (or nothing), and more than the updates in between can have done. Without updates nothing is
    judged.
    """
    for sizes in series_of(recorded, is_parameter):
        values = sizes.values
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            times = values[1:] / values[:-1]
            far = np.maximum(times, 1 / times)
        far[~(np.isfinite(far) | (times == 0))] = 0.0
        if not (far >= factor).any():
            continue
        updates = named(recorded, key_of("update", sizes.site, "relative_norm"))
        if updates is None:
            continue
        moves = updates.on(sizes.steps)
        for place in np.flatnonzero(far >= factor) + 1:
            since = max(1, int(place) - 5)
            near = slice(since, int(place) + 1)
            moved = np.nan_to_num(moves[near], nan=0.0, posinf=np.inf)
            if times[place - 1] < 1 and np.isfinite(moved[:-1]).all() and np.isinf(moved[-1]):
                moved[-1] = 0.0  # it was not zero before, and was when its optimizer stepped
            move = float(moved.max())
            if not np.isfinite(move) or not np.isfinite(moves[0]):
                continue  # it begins at zero, from which any size is near
            gap = int(sizes.steps[place] - sizes.steps[place - 1])
            # Updates multiply, or add up: what passes through zero is nothing for a moment.
            reach = min(gap * float(np.log1p(move)), 600.0)
            largest = np.maximum(values[near], values[since - 1 : place])
            length = factor * gap * float((moved * largest).max())
            if (
                np.log(far[place - 1]) <= np.log(factor) + reach
                or abs(values[place] - values[place - 1]) <= length
            ):
                continue
            flagged = np.arange(len(values)) == place
            (episode,) = episodes(sizes, flagged)
            text = (
                f"{sizes.site} is {number(float(times[place - 1]))} times as large at step"
                f" {sizes.steps[place]} as at step {sizes.steps[place - 1]}, while its optimizer"
                f" changed it by {number(100 * move)} % a step at most: something else wrote to it."
            )
            yield episode.anomaly("parameter_jump", "high", factor, text)


def _shrunk(newest: Newest) -> Ending:
    none = np.zeros(len(newest), dtype=np.bool_)
    if not len(newest) or len(newest.series(0).values) % 10:
        return Ending.of(newest, none)
    first = np.array([newest.series(place).values[0] for place in range(len(newest))])
    return Ending.of(newest, newest.values < 0.7 * first, none)


def _jumped(newest: Newest) -> Ending:
    if not len(newest):
        return Ending.of(newest, np.zeros(0, dtype=np.bool_))
    before = newest.before(1)[:, 0]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        times = newest.values / before
        return Ending.of(newest, (times >= _JUMP) | (times <= 1 / _JUMP))


def _one(info: KeyInfo) -> int:
    return 0


def _site(info: KeyInfo) -> str:
    return info.site


DECAY_ENDS = (EndsWith("parameter_decay", "medium", is_parameter, _shrunk, _one),)
WRITES_END = (EndsWith("parameter_jump", "high", is_parameter, _jumped, _site, is_update),)
