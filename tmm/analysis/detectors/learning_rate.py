"""Learning rates that are too high or too low for most of the weights."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, episodes, number
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.layers import is_parameter, is_update, joined, trained
from tmm.analysis.recent import Newest
from tmm.analysis.robust import bridged, jumps, medians
from tmm.analysis.series import Series, is_metric, series_of
from tmm.core.families import GRADIENT
from tmm.core.keys import is_total_loss
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded

ALL = "all parameters"
"""The site of what is of all parameters together."""

_is_norm = is_metric(GRADIENT.name, "norm")
_HIGH = 0.5
_JUMPED = 0.03
_ENDLESS = 1e100
_NOTHING = 1e-7  # the norm of a gradient that vanishes
_LONG = 40  # recorded steps after which alerts look whether anything has moved


def large_rates(
    recorded: Recorded,
    *,
    high: float = _HIGH,
    critical: float = 1.0,
    jump: float = 10.0,
    smallest: float = _JUMPED,
) -> Iterator[Anomaly]:
    """Steps that change most weights by more than ``high`` of their norm: high.

    It is the median of ``relative_norm`` over all parameters but biases that counts, above
    ``critical`` it is critical. That is a scale without units, so that no step need come before;
    what begins at zero is left out until it has a size. In the first recorded step a single one
    that is changed by more than ``critical`` counts, too, if it had a usual size before. High is
    also a jump to ``jump`` times the median of up to 50 recorded values before (five at the least),
    above ``smallest``.
    """
    parts = trained(recorded)
    if not parts:
        return
    steps, values = joined(parts)
    begins = _beginnings(recorded, parts)
    usual_size = float(medians(begins[None])[0])
    for place in np.flatnonzero(~(begins >= 0.01 * usual_size)):  # those that begin at zero
        settled = np.flatnonzero(values[place] <= high)
        values[place, : settled[0] if len(settled) else None] = np.nan
    series = _together(parts, steps, values)
    if not (series.values[:1] > high).any():
        yield from _of_one(parts, begins, usual_size, critical)
    jumped, usual = jumps(series.values, factor=jump, score=8.0, window=50, least=5)
    flagged = (series.values > high) | (jumped & (series.values > smallest))
    for episode in episodes(series, bridged(flagged, series.values > min(high / 2, smallest))):
        limit = critical if episode.value > critical else high
        severity: Severity = "critical" if episode.value > critical else "high"
        text = (
            f"A step changed the weights by {number(100 * episode.value)} % of their norm"
            f" {episode.when}, in the median of {len(parts)} parameters: the learning rate is too"
            " high"
        )
        if episode.value <= high:
            limit = jump * usual[episode.places.start]
            text += f"; before, it was {number(100 * limit / jump)} %"
        if episode.places.start == 0 and episode.places.stop < len(steps):
            text += " for the first steps (is a warm-up missing?)"
        yield episode.anomaly("update_large", severity, limit, text + ".")


def small_rates(
    recorded: Recorded, *, travel: float = 0.001, least: int = 20, never: float = 1e-6
) -> Iterator[Anomaly]:
    """Weights that hardly move while the loss does not fall: medium.

    Of at least ``least`` recorded steps: all updates together, added up as if all had one
    direction, are less than ``travel`` of the norm in the median of the parameters, and the loss
    has not fallen by more than its noise. Where no loss is logged: no update above ``never``.
    Parameters without a gradient to speak of in half of the steps are left out; where they are the
    larger part, that is why nothing moves, and there is nothing to say of the learning rate.
    """
    every = trained(recorded)
    still = _without_gradient(recorded)
    parts = [part for part in every if part.site not in still]
    if not parts or 2 * len(parts) < len(every):
        return
    steps, values = joined(parts)
    if len(steps) < least:
        return
    series = _together(parts, steps, values)
    gaps = np.diff(steps, append=steps[-1] + 1)
    moves = np.nan_to_num(series.values)
    moved, largest = float((moves.clip(0, 1e9) * gaps).sum()), float(moves.max())
    losses = [s.finite() for s in series_of(recorded, is_total_loss)]
    stands = [_stands(loss) for loss in losses if len(loss.values) >= least]
    if moved >= travel or not (all(stands) if stands else largest < never):
        return
    finite = series.finite()
    if not len(finite.values):
        return
    (episode,) = episodes(finite, np.ones(len(finite.values), dtype=np.bool_))
    text = (
        f"All steps {episode.when} together can have changed the weights by"
        f" {number(100 * moved)} % at most (in the median of {len(parts)} parameters)"
        + (", and the loss has not fallen" if stands else "")
        + ": the learning rate is too low."
    )
    yield episode.anomaly("update_small", "medium", travel, text)


def _without_gradient(recorded: Recorded) -> set[str]:
    """The parameters whose gradients are too small to be the learning rate's affair."""
    norms = [s.finite() for s in series_of(recorded, _is_norm)]
    return {s.site for s in norms if len(s.values) and np.mean(s.values < _NOTHING) >= 0.5}


def _beginnings(recorded: Recorded, parts: list[Series]) -> np.ndarray:
    """At least how large each parameter was before its first update, shape (n,).

    That of the size after it and of what the update was of it; infinite where no size is measured.
    """
    sizes = {s.site: s for s in series_of(recorded, is_parameter)}
    least = np.full(len(parts), np.inf)
    for place, part in enumerate(parts):
        size = sizes.get(part.site)
        move = float(part.values[0]) if len(part.values) else 0.0
        if size is not None and len(size.values):
            least[place] = abs(float(size.values[0])) / (1 + abs(move))
        elif not np.isfinite(move):
            least[place] = 0.0
    return np.where(np.isnan(least), 0.0, least)


def _of_one(
    parts: list[Series], begins: np.ndarray, usual: float, critical: float
) -> Iterator[Anomaly]:
    """The parameter that the first recorded step changed most, if that is too much."""
    moves = np.array([part.values[0] if len(part.values) else np.nan for part in parts])
    counts = np.isfinite(moves) & (begins >= 0.05 * usual) & np.isfinite(begins)
    if not (counts & (moves > critical)).any():
        return
    part = parts[int(np.argmax(np.where(counts, moves, -np.inf)))]
    first = np.arange(len(part.values)) == 0
    (episode,) = episodes(part, first)
    text = (
        f"The first recorded step changed {part.site} by {number(100 * episode.value)} % of its"
        " norm: the learning rate is too high."
    )
    yield episode.anomaly("update_large", "critical", critical, text)


def _together(parts: list[Series], steps: np.ndarray, values: np.ndarray) -> Series:
    """The median over the parameters that had an update in a step."""
    # What begins at zero is infinite: it counts as large.
    middle = medians(np.where(np.isposinf(values), 1e9, values).T)
    info = max(parts, key=lambda part: len(part.steps)).info  # has most of the steps
    return Series(type(info)(info.key, info.kind, ALL, info.position, ""), steps, middle)


def _stands(loss: Series) -> bool:
    """Whether a loss is at its end where it was at its beginning, but for noise."""
    values = loss.values.clip(-_ENDLESS, _ENDLESS)
    quarter = max(3, len(values) // 4)
    early, late = values[:quarter], values[-quarter:]
    noise = float(np.median(np.abs(np.diff(values)))) / np.sqrt(quarter)
    fall = float(np.median(early) - np.median(late))
    return bool(fall <= 3 * noise + 0.002 * abs(float(np.median(early))))


def _one(info: object) -> int:
    return 0


def _tells_standstill(info: KeyInfo) -> bool:
    return is_total_loss(info) or _is_norm(info)


def _may_be_large(newest: Newest) -> Ending:
    values = newest.values
    flagged = values > _JUMPED
    possible = flagged & (2 * flagged.sum() >= len(values) / 2)
    return Ending.of(newest, possible, np.zeros(len(values), dtype=np.bool_))


def _after_a_while(newest: Newest) -> Ending:
    count = len(newest.series(0).values) if len(newest) else 0
    possible = np.full(len(newest), count == _LONG, dtype=np.bool_)
    return Ending.of(newest, possible & np.isfinite(newest.values))


RATES_END = (EndsWith("update_large", "critical", is_update, _may_be_large, _one, is_parameter),)
STANDSTILL_ENDS = (
    EndsWith("update_small", "medium", is_update, _after_a_while, _one, _tells_standstill),
)
