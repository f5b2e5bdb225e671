"""Robust statistics of what came before each value of a series, and runs of flags."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from tmm.analysis.series import BoolArray
from tmm.core.metrics import FloatArray

NORMAL = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""

_ROWS_AT_ONCE = 1 << 16  # windows: 25 MiB for 50 values each


def before(values: FloatArray, window: int, least: int) -> tuple[FloatArray, FloatArray]:
    """Median and spread of up to ``window`` values before each one, both of shape (n,).

    The spread is the median absolute deviation times 1.4826. NaN where there are fewer than
    ``least`` values. ``values`` are finite.
    """
    padded = np.concatenate([np.full(window, np.nan), values])
    windows = sliding_window_view(padded, window)[: len(values)]
    medians, spreads = np.empty(len(values)), np.empty(len(values))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(values), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            medians[part] = _median(windows[part], least)
            deviations = np.abs(windows[part] - medians[part, None])
            spreads[part] = NORMAL * _median(deviations, least)
    return medians, spreads


def jumps(
    values: FloatArray,
    *,
    factor: float,
    score: float,
    window: int,
    least: int,
    floor: float = 0.05,
) -> tuple[BoolArray, FloatArray]:
    """Which positive values jumped above those before them, and what was usual; both (n,).

    On the scale of log10: at least ``factor`` times the median of the ``window`` values before,
    more than ``score`` spreads above it (the spread being ``floor`` decades at least, so that
    constant series work), and above the median of everything before. Zeros and what is not finite
    are neither judged nor remembered.
    """
    flagged, usual = np.zeros(len(values), dtype=np.bool_), np.full(len(values), np.nan)
    with np.errstate(invalid="ignore"):
        judged = np.flatnonzero(np.isfinite(values) & (values > 0))
    if not len(judged) or values[judged].max() / factor < values[judged].min():
        return flagged, usual  # no value is that far above any median
    logarithms = np.log10(values[judged])
    level, spread = before(logarithms, window, least)
    rise = logarithms - level
    found = (rise >= np.log10(factor)) & (rise > score * np.maximum(spread, floor))
    for place in np.flatnonzero(found):
        found[place] = logarithms[place] > np.median(logarithms[:place])
    flagged[judged] = found
    usual[judged] = 10.0 ** np.minimum(level, 308.0)
    return flagged, usual


def jumps_now(
    newest: FloatArray,
    windows: FloatArray,
    *,
    factor: float,
    score: float,
    least: int,
    floor: float = 0.05,
) -> tuple[BoolArray, BoolArray]:
    """Which newest values, shape (n,), are far above ``windows`` of those before, (n, window).

    As `jumps` judges them, but for what was before the windows. The second are those of which that
    cannot be told, as their windows hold values that `jumps` leaves out.
    """
    judged = np.isfinite(newest) & (newest > 0)
    strange = judged & ((windows <= 0) | np.isinf(windows)).any(axis=1)
    gaps = np.isnan(windows)
    strange |= judged & (gaps[:, 1:] & ~gaps[:, :-1]).any(axis=1)  # on the left nothing was yet
    far = np.zeros(len(newest), dtype=np.bool_)
    ordered = np.sort(windows, axis=1)  # NaN comes last
    lower = ordered[np.arange(len(windows)), np.maximum((~gaps).sum(axis=1) - 1, 0) // 2]
    with np.errstate(invalid="ignore", over="ignore"):
        # Few are: the median of logarithms is not below that of two middle values which is lower.
        near = newest >= factor * lower * (1 - 1e-9)
    places = np.flatnonzero(judged & ~strange & near)
    logarithms = np.log10(windows[places])
    level = _median(logarithms, least)
    spread = NORMAL * _median(np.abs(logarithms - level[:, None]), least)
    rise = np.log10(newest[places]) - level
    far[places] = (rise >= np.log10(factor)) & (rise > score * np.maximum(spread, floor))
    return far, strange


def is_above_median(value: float, others: FloatArray) -> bool:
    """Whether a positive value is above the median of ``others`` that `jumps` judges."""
    with np.errstate(invalid="ignore"):
        judged = others[np.isfinite(others) & (others > 0)]
    middle, below = len(judged) // 2, int((judged < value).sum())
    if below > middle or below < middle:
        return below > middle
    return bool(np.log10(value) > np.median(np.log10(judged)))


def runs(flags: BoolArray, least: int = 1) -> Iterator[slice]:
    """The runs of at least ``least`` true flags, as slices."""
    if not flags.any():
        return
    edges = np.diff(np.concatenate([[0], flags.astype(np.int8), [0]]))
    for start, stop in zip(np.flatnonzero(edges > 0), np.flatnonzero(edges < 0), strict=True):
        if stop - start >= least:
            yield slice(int(start), int(stop))


def begun_suddenly(flags: BoolArray, values: FloatArray, factor: float, near: int = 3) -> BoolArray:
    """The runs of flags whose first value is ``factor`` times the largest of ``near`` before it."""
    result = flags.copy()
    for places in runs(flags):
        last = values[max(0, places.start - near) : places.start]
        if len(last) and not values[places.start] >= factor * last.max():
            result[places] = False
    return result


def bridged(flags: BoolArray, lasting: BoolArray) -> BoolArray:
    """The flags, and what lies between two of them where ``lasting`` holds throughout.

    So a value that trembles about its limit is one episode.
    """
    result = flags.copy()
    if not flags.any():
        return result
    for places in runs(flags | lasting):
        flagged = np.flatnonzero(flags[places])
        if len(flagged):
            result[places.start + flagged[0] : places.start + flagged[-1]] = True
    return result


def early_median(values: FloatArray, count: int = 10) -> float:
    """The median of the first ``count`` values; NaN without any."""
    return median(values[:count]) if len(values) else float("nan")


def median(values: FloatArray) -> float:
    """The median, also of numbers whose sum would overflow."""
    return 2.0 * float(np.median(values / 2.0))


def medians(rows: FloatArray) -> FloatArray:
    """The median of what is not NaN in each row, shape (n,); NaN for rows without any."""
    return _median(rows, 1)


def _median(windows: FloatArray, least: int) -> FloatArray:
    """The median of what is not NaN in each row; NaN for fewer than ``least``."""
    ordered = np.sort(windows, axis=1)  # NaN comes last
    counts = windows.shape[1] - np.isnan(windows).sum(axis=1)
    rows = np.arange(len(windows))
    low, high = np.maximum(counts - 1, 0) // 2, np.minimum(counts // 2, windows.shape[1] - 1)
    with np.errstate(invalid="ignore"):  # between infinities of both signs there is none
        medians = 0.5 * ordered[rows, low] + 0.5 * ordered[rows, high]
    return np.where(counts >= max(least, 1), medians, np.nan)
