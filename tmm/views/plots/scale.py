"""How values become colours: magnitudes by their logarithm, what has a sign symmetrically."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from tmm.core.families import ATTENTION
from tmm.core.metrics import BOUNDED, BOUNDED_OF_ATTENTION, FloatArray

ScaleKind: TypeAlias = Literal["linear", "log", "symmetric"]

SHARES = frozenset((*BOUNDED, *map(ATTENTION.of, BOUNDED_OF_ATTENTION)))
"""Metrics and families on a linear scale, whatever their values."""

_RANGE = 30.0  # from which ratio of magnitudes on a logarithm shows more
_LEAST_SPAN = 1e-3  # of a linear scale, as a part of the values
_LARGEST = sys.float_info.max
_TICKS = 7
_DECADES = 12  # of a symmetric scale on each side, at most


@dataclass(frozen=True)
class Scale:
    """Maps values to positions on a colour bar, from ``low`` to ``high``.

    "log" maps x > 0 to log10 x, and 0 to ``low``, which lies below all others; "symmetric" maps x
    to sign(x) log10(1 + |x| / ``unit``). ``ticks`` are positions, and ``labels`` their values.
    """

    kind: ScaleKind
    low: float
    high: float
    unit: float
    ticks: tuple[float, ...]
    labels: tuple[str, ...]

    def apply(self, values: FloatArray) -> FloatArray:
        """Positions on the bar, shape as ``values``; NaN stays NaN."""
        if self.kind == "linear":
            return values
        if self.kind == "symmetric":
            return np.sign(values) * np.log10(1 + np.abs(values) / self.unit)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(values == 0, self.low, np.log10(values))


def scale_for(parts: Iterable[FloatArray], *, linear: bool = False) -> Scale:
    """The scale that shows the finite values of all ``parts`` best; one that is ``linear`` or any.

    Values of one order of magnitude are on a linear scale, too.
    """
    sizes, low, high, has_zero = [], math.inf, -math.inf, False
    for part in parts:
        finite = part[np.isfinite(part)]
        if not finite.size:
            continue
        low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        magnitudes = np.abs(finite[finite != 0])
        has_zero = has_zero or magnitudes.size < finite.size
        if magnitudes.size:
            sizes += [float(magnitudes.min()), float(magnitudes.max())]
    if linear or not sizes or max(sizes) / _RANGE <= min(sizes):
        return _linear(low, high)
    least, most = min(sizes), max(sizes)
    if low < 0:
        unit = max(least, most / 10.0**_DECADES)
        return _symmetric(low, high, unit)
    bottom, top = math.log10(least), math.log10(most)
    if has_zero:
        bottom -= max(0.5, 0.06 * (top - bottom))
    exponents = range(math.ceil(math.log10(least)), math.floor(top) + 1)
    chosen = exponents[:: max(1, math.ceil(len(exponents) / _TICKS))]
    ticks = [float(exponent) for exponent in chosen]
    labels = [_label(10.0**exponent) for exponent in chosen]
    if not ticks:
        ticks, labels = [math.log10(least), top], [_label(least), _label(most)]
    if has_zero:
        ticks, labels = [bottom, *ticks], ["0", *labels]
    return Scale("log", bottom, top, 1.0, tuple(ticks), tuple(labels))


def _linear(low: float, high: float) -> Scale:
    if low > high:
        low, high = 0.0, 1.0
    # What hardly differs looks so; halved first, since a difference of large numbers may overflow.
    least = _LEAST_SPAN * max(abs(low), abs(high)) or 1.0
    if high / 2 - low / 2 < least / 2:
        middle = low / 2 + high / 2
        low, high = max(middle - least / 2, -_LARGEST), min(middle + least / 2, _LARGEST)
    ticks = [low * (1 - part) + high * part for part in (0.0, 0.25, 0.5, 0.75, 1.0)]
    digits = 3
    while len({_label(tick, digits) for tick in ticks}) < len(ticks) and digits < 17:
        digits += 1
    labels = tuple(_label(tick, digits) for tick in ticks)
    return Scale("linear", low, high, 1.0, tuple(ticks), labels)


def _symmetric(low: float, high: float, unit: float) -> Scale:
    def place(value: float) -> float:
        return math.copysign(math.log10(1 + abs(value) / unit), value)

    top = place(max(-low, high))
    exponents = range(math.ceil(math.log10(unit)), math.floor(math.log10(max(-low, high))) + 1)
    chosen = exponents[:: max(1, math.ceil(len(exponents) / 3))]
    values = [*(-(10.0**e) for e in reversed(chosen)), 0.0, *(10.0**e for e in chosen)]
    return Scale(
        "symmetric", -top, top, unit, tuple(map(place, values)), tuple(_label(v) for v in values)
    )


def _label(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}g}"
