"""Units at the ends of their range, which pass hardly any gradient, and outputs all alike."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, episodes, number
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.layers import layers_of
from tmm.analysis.recent import Newest
from tmm.analysis.robust import bridged
from tmm.analysis.series import Series, is_metric, named, series_of
from tmm.core.families import MODEL_OUTPUT
from tmm.core.keys import key_of
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded

_OPEN = 0.02
_ALIKE = 0.05
_is_rms = is_metric("activation", "rms")
_is_spread = is_metric(MODEL_OUTPUT.name, "spread")
_is_bounded = is_metric("activation", "rms", "mean", "absmax")


def saturated_units(
    recorded: Recorded, *, open_part: float = _OPEN, least: int = 5
) -> Iterator[Anomaly]:
    """Outputs between -1 and 1 that are at the ends of their range, ``least`` recorded steps long.

    Of a sigmoid ``mean - rms**2`` is the mean of its derivative, x (1 - x), and of a hyperbolic
    tangent ``1 - rms**2`` is: below ``open_part`` it is medium, below a tenth of that high. What no
    layer with weights follows may be sure of its answer; a mean that never changes is that of
    probabilities or masks.
    """
    ends = [layer.output.info.position for layer in layers_of(recorded)]
    last = max(ends, default=-1)
    for rms in series_of(recorded, _is_rms):
        if rms.info.position >= last:
            continue
        kind, site = rms.info.kind, rms.info.site
        mean = named(recorded, key_of(kind, site, "mean"))
        largest = named(recorded, key_of(kind, site, "absmax"))
        if largest is None or len(rms.values) < least:
            continue
        high = largest.on(rms.steps)
        is_in_range = (high <= 1.0) & (high > 0.99)
        if not is_in_range.any():
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.minimum(rms.values, 10.0) ** 2
        slope = 1 - squares
        if mean is not None:
            means = mean.on(rms.steps)
            changes = np.isfinite(means).all() and np.ptp(means) > 1e-5 * np.abs(means).max()
            # Of values between 0 and 1 the mean is never below the mean square.
            if changes and (means >= squares - 1e-6).all():
                slope = np.minimum(slope, means - squares)
        slope = np.where(is_in_range, slope, np.inf)
        slopes = Series(rms.info, rms.steps, slope)
        for episode in episodes(slopes, slope < open_part, badness=-slope, least=least):
            severity: Severity = "high" if episode.value < open_part / 10 else "medium"
            text = (
                f"The output of {rms.site} is at the ends of its range {episode.when}: what comes"
                f" back through it is about {number(max(episode.value, 0.0))} of the gradient."
            )
            yield episode.anomaly("saturation", severity, open_part, text)


def alike_outputs(
    recorded: Recorded,
    *,
    high: float = _ALIKE,
    part: float = 0.2,
    before: float = 0.1,
    least: int = 5,
) -> Iterator[Anomaly]:
    """Outputs of the model that became the same for all items: high.

    The ``spread`` is below ``high``, and below ``part`` of what was usual before (the median, at
    least ``before``), for ``least`` recorded steps.
    """
    for series in series_of(recorded, _is_spread):
        spreads = series.finite()
        low = bridged(spreads.values < high, spreads.values < 2 * high)
        for episode in episodes(spreads, low, badness=-spreads.values, least=least):
            earlier = spreads.values[: episode.places.start]
            usual = float(np.median(earlier[-10:])) if len(earlier) else np.nan
            if not (usual >= before and episode.value < part * usual):
                continue
            text = (
                f"The model gives nearly the same output for all items {episode.when}: they lie"
                f" apart by {number(episode.value)} of their size, before by {number(usual)}; its"
                " representations have collapsed."
            )
            yield episode.anomaly("output_collapse", "high", high, text)


def _low(newest: Newest) -> Ending:
    return Ending.of(newest, newest.values < _ALIKE)


def _saturated(newest: Newest) -> Ending:
    # Of outputs up to 1, 1 - rms ** 2 and the mean are not known here: all near them may be.
    return Ending.of(newest, (newest.values > 0.05) & (newest.values <= 1.0) & _fifth(newest))


def _fifth(newest: Newest) -> bool:
    return bool(len(newest)) and len(newest.series(0).values) % 5 == 0


def _module(info: KeyInfo) -> str:
    return key_of(info.kind, info.site)


SATURATION_ENDS = (EndsWith("saturation", "high", _is_rms, _saturated, _module, _is_bounded),)
COLLAPSE_ENDS = (EndsWith("output_collapse", "high", _is_spread, _low),)
