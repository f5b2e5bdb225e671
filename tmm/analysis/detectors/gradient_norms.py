"""Gradients that are clipped, multiplied or lost: what their norms say together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, episodes, number
from tmm.analysis.detectors.learning_rate import ALL
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.layers import is_bias, is_output, is_parameter, joined, layers_of
from tmm.analysis.recent import Newest
from tmm.analysis.robust import medians
from tmm.analysis.series import Series, is_metric, named, series_of, skipped_steps
from tmm.core.families import GRADIENT, MODEL_INPUT
from tmm.core.keys import is_total_loss, total_norm
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded

_LEVEL = 5  # recorded values that tell a level
_TOTAL = total_norm(GRADIENT.name)
_is_norm = is_metric(GRADIENT.name, "norm")
_is_count = is_metric(MODEL_INPUT.name, "elements")


def clipped_gradients(
    recorded: Recorded, *, part: float = 0.9, tolerance: float = 1e-3, least: int = 10
) -> Iterator[Anomaly]:
    """A norm of all gradients that is the same in nearly every step: clipped, low.

    ``part`` of at least ``least`` recorded values, from the first of them on, lie within
    ``tolerance`` of the largest.
    """
    total = named(recorded, _TOTAL)
    if total is None:
        return
    norms = total.without(skipped_steps(recorded)).finite()
    if len(norms.values) < least or norms.values.max() <= 0:
        return
    limit = float(np.median(norms.values))
    same = np.abs(norms.values - limit) <= tolerance * limit
    if same.mean() < part:
        return
    flagged = np.zeros(len(same), dtype=np.bool_)
    flagged[int(np.argmax(same)) :] = True
    (episode,) = episodes(norms, flagged, badness=np.where(same, 1.0, 0.0))
    text = (
        f"The norm of all gradients is {number(limit)} in {int(same.sum())} of {len(same)} recorded"
        " steps: they are clipped nearly always, and only their direction counts."
    )
    yield episode.anomaly("gradient_clipped", "low", limit, text)


def multiplied_gradients(
    recorded: Recorded,
    *,
    items: float = 1.5,
    factor: float = 1.2,
    alone: float = 4.0,
    spread: float = 2.5,
    window: int = 10,
    least: int = 3,
) -> Iterator[Anomaly]:
    """Gradients that all grew by one factor from one step to the next, and stay so: medium.

    The median, over the parameters, of the norm in the five recorded values from there over that in
    the ``window`` before (five, where a step has more items) is ``factor`` where a step has
    ``items`` times as many items as before (of a mean over more of them they would be smaller), and
    ``alone`` where it has not, if three quarters of the parameters differ from the median by less
    than ``spread``, the loss is what it was, and the norms leave at once the level on which they
    had been for five recorded values: those of a training that takes off grow over several steps.
    """
    parts = [s for s in series_of(recorded, _is_norm) if not is_bias(s.site)]
    if not parts:
        return
    steps, norms = joined(parts)
    skipped = np.isin(steps, skipped_steps(recorded))
    steps, norms = steps[~skipped], norms[:, ~skipped]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where((norms > 0) & np.isfinite(norms), np.log10(norms), np.nan)
    counts = next(iter(series_of(recorded, _is_count)), None)
    count = counts.on(steps) if counts is not None else np.ones(len(steps))
    losses = next(iter(series_of(recorded, is_total_loss)), None)
    place = least
    while place <= len(steps) - least:
        before, after = slice(max(0, place - window), place), slice(place, place + window)
        more = _quotient(count[after][:least], count[before])
        if more >= items:
            before = slice(max(0, place - 5), place)
        rises = medians(logs[:, after][:, : max(least, 5)]) - medians(logs[:, before])
        rise = float(np.nan_to_num(medians(rises[None])[0]))
        has_more = more >= items and count[place] >= items * count[place - 1]
        is_one = has_more or _is_one_factor(rises, rise, spread)
        asked = factor if has_more else alone
        sudden = _is_sudden(logs, place, rise)
        if (
            rise < np.log10(asked)
            or not is_one
            or not sudden
            or not (has_more or _is_new_level(logs, place, rise))
            or not (has_more or _is_same_loss(losses, steps, place, window))
        ):
            place += 1
            continue
        yield _said(recorded, parts[0], steps, logs, place, rise, more if has_more else None)
        place += window


def _quotient(now: np.ndarray, before: np.ndarray) -> float:
    """That of the medians; 1 where it is not known."""
    middle, usual = medians(np.array([now]))[0], medians(np.array([before]))[0]
    is_known = np.isfinite(middle) and np.isfinite(usual) and usual > 0
    with np.errstate(over="ignore"):
        return float(middle / usual) if is_known else 1.0


def _is_one_factor(rises: np.ndarray, rise: float, spread: float) -> bool:
    known = rises[np.isfinite(rises)]
    return len(known) > 1 and float(np.quantile(np.abs(known - rise), 0.75)) < np.log10(spread)


def _is_sudden(logs: np.ndarray, place: int, rise: float) -> bool:
    """Whether most of the rise happened at that step, rather than over several."""
    now, last = logs[:, place], medians(logs[:, max(0, place - 3) : place])
    return bool(medians((now - last)[None])[0] >= 0.6 * rise)


def _is_new_level(logs: np.ndarray, place: int, rise: float) -> bool:
    """Whether even the lowest of the values from there is far above the highest of those before."""
    if place < _LEVEL:
        return False
    before, after = logs[:, place - _LEVEL : place], logs[:, place : place + _LEVEL]
    middle = medians(before)[:, None]
    highest, lowest = medians((before - middle).T).max(), medians((after - middle).T).min()
    return bool(lowest - highest >= 0.5 * rise)


def _is_same_loss(losses: Series | None, steps: np.ndarray, place: int, window: int) -> bool:
    if losses is None:
        return False
    values = losses.on(steps)
    early, late = values[max(0, place - window) : place], values[place : place + 2]
    if not (np.isfinite(early).any() and np.isfinite(late).all()):
        return False
    middle = float(medians(early[None])[0])
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.abs(late - middle).max() <= 0.5 * abs(middle))


def _said(
    recorded: Recorded,
    first: Series,
    steps: np.ndarray,
    logs: np.ndarray,
    place: int,
    rise: float,
    more: float | None,
) -> Anomaly:
    total = named(recorded, _TOTAL) or first
    info = KeyInfo(total.key, total.info.kind, ALL, total.info.position, "")
    middle = 10 ** np.nan_to_num(medians(logs.T), nan=-300)
    flagged = np.arange(len(steps)) >= place
    (episode,) = episodes(Series(info, steps, middle), flagged)
    text = (
        f"From step {steps[place]} on the gradients of all parameters are about"
        f" {number(10**rise)} times as large as before, "
    )
    if more is None:
        text += "while the loss is what it was: the loss is multiplied, or not divided."
    else:
        text += (
            f"and a step has {number(more)} times as many items: the sum over micro-batches is not"
            " divided by their number."
        )
    return episode.anomaly("gradient_scale", "medium", 10**rise, text)


def lost_gradients(
    recorded: Recorded, *, part: float = 1e-4, least: int = 3, window: int = 10
) -> Iterator[Anomaly]:
    """Gradients that are lost between layers: medium.

    The norm of a weight is below ``part`` of its median in the ``window`` recorded values before,
    while those of half of the others are not; or, from the first recorded steps on, below ``part``
    of that of the last layer, in ``least`` recorded steps in a row. One row, for the layer that is
    nearest to the output.
    """
    skipped = skipped_steps(recorded)
    order = {layer.name: place for place, layer in enumerate(layers_of(recorded))}
    some = [s.without(skipped) for s in series_of(recorded, _is_norm)]
    parts = [s for s in some if "weight" in s.site.rpartition(".")[2] and len(s.values) >= least]
    parts = [s for s in parts if s.site.rpartition(".")[0] in order]
    parts.sort(key=lambda s: order[s.site.rpartition(".")[0]])
    if len(parts) < 3:
        return
    steps, norms = joined(parts)
    norms = np.where(np.isfinite(norms), norms, np.nan)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        usual = medians(norms[:, :window])
        usual = np.where(usual > 0, usual, np.nan)
        gone = (norms < part * usual[:, None]) & (norms > 0)
        others = norms > 0.01 * usual[:, None]
        gone &= others.mean(axis=0) >= 1 / len(parts)
        deep = (norms < part * norms[-1]) & (norms > 0) & (usual[:, None] < part * usual[-1])
    for place in range(len(parts) - 1, -1, -1):
        flagged = gone[place] | deep[place]
        series = Series(parts[place].info, steps, np.nan_to_num(norms[place]))
        for episode in episodes(series, flagged, badness=-series.values, least=least):
            text = (
                f"Hardly any gradient comes to {series.site} {episode.when}: its norm is as small"
                f" as {number(episode.value)}, that of the last layer about"
                f" {number(float(medians(norms[-1:])[0]))}."
            )
            severity: Severity = "medium"
            yield episode.anomaly("gradient_vanishing", severity, part, text)
            return


def _is_total(info: KeyInfo) -> bool:
    return info.key == _TOTAL


def _tenth(newest: Newest) -> Ending:
    is_tenth = bool(len(newest)) and len(newest.series(0).values) % 10 == 0
    possible = np.full(len(newest), is_tenth, dtype=np.bool_)
    return Ending.of(newest, possible, np.zeros(len(newest), dtype=np.bool_))


def _risen(newest: Newest) -> Ending:
    """Where the newest but two are far above those before."""
    none = np.zeros(len(newest), dtype=np.bool_)
    if len(newest) and len(newest.series(0).values) > 6:
        before = newest.before(7)
        with np.errstate(invalid="ignore", over="ignore"):
            risen = before[:, -2:].min(axis=1) > 1.5 * medians(before[:, :5])
        none = np.full(len(newest), bool(risen.mean() >= 0.5), dtype=np.bool_)
    return Ending.of(newest, none)


def _fallen(newest: Newest) -> Ending:
    none = np.zeros(len(newest), dtype=np.bool_)
    if not len(newest) or len(newest.series(0).values) < 3:
        return Ending.of(newest, none)
    first = np.array([newest.series(place).values[0] for place in range(len(newest))])
    finite = newest.values[np.isfinite(newest.values)]
    largest = float(finite.max()) if len(finite) else 0.0
    fallen = (newest.values < 1e-3 * first) | (newest.values < 1e-4 * largest)
    return Ending.of(newest, fallen, none)


def _one(info: KeyInfo) -> int:
    return 0


def _reads(info: KeyInfo) -> bool:
    return _is_count(info) or is_total_loss(info) or _is_total(info)


def _of_layers(info: KeyInfo) -> bool:
    return is_output(info) or is_parameter(info)


CLIPS_END = (EndsWith("gradient_clipped", "low", _is_total, _tenth),)
FACTOR_ENDS = (EndsWith("gradient_scale", "medium", _is_norm, _risen, _one, _reads),)
LOSS_ENDS = (EndsWith("gradient_vanishing", "medium", _is_norm, _fallen, _one, _of_layers),)
