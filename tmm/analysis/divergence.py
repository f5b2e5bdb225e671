"""Where two runs that should be alike part."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tmm.analysis.anomaly import EqualWithNaN
from tmm.analysis.order import execution_ranks
from tmm.analysis.series import BoolArray
from tmm.core.metrics import FloatArray
from tmm.core.series_by_key import Recorded


@dataclass(frozen=True, eq=False)
class Divergence(EqualWithNaN):
    """The first step at which two runs differ, and the first key in the execution of that step.

    ``a`` and ``b`` are its values in them; ``others`` differ at the same step, in the order of
    execution.
    """

    step: int
    key: str
    site: str
    a: float
    b: float
    others: tuple[str, ...]


def first_divergence(
    a: Recorded,
    b: Recorded,
    *,
    relative: float = 0.1,
    absolute: float = 1e-8,
    keys: Iterable[str] | None = None,
) -> Divergence | None:
    """The first common step at which a common key differs; None where there is none.

    Two values differ if they are further apart than ``absolute + relative * max(|a|, |b|)``, if one
    of them is NaN, or if one is infinite and the other is not the same. ``keys`` are by default all
    common ones but those of the system (``system/…``), which differ by themselves. Raises KeyError
    for a key that one of them lacks.
    """
    if keys is None:
        names, common = a.keys(), set(b.keys())
        keys = [k for k in names if k in common and a.key_info(k).kind != "system"]
    first: dict[str, tuple[int, float, float]] = {}
    for key in keys:
        (steps_a, values_a), (steps_b, values_b) = a.series(key), b.series(key)
        if values_a.ndim != 1 or values_b.ndim != 1:
            continue
        steps, in_a, in_b = np.intersect1d(steps_a, steps_b, True, return_indices=True)
        left, right = values_a[in_a], values_b[in_b]
        found = np.flatnonzero(_differ(left, right, relative, absolute))
        if len(found):
            place = found[0]
            first[key] = (int(steps[place]), float(left[place]), float(right[place]))
    if not first:
        return None
    step = min(found_step for found_step, _, _ in first.values())
    ranks = execution_ranks(a, first)
    key, *others = sorted((k for k in first if first[k][0] == step), key=lambda k: ranks[k])
    _, value_a, value_b = first[key]
    return Divergence(step, key, a.key_info(key).site, value_a, value_b, tuple(others))


def _differ(a: FloatArray, b: FloatArray, relative: float, absolute: float) -> BoolArray:
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.maximum(np.abs(a), np.abs(b))
        apart: BoolArray = np.abs(a - b) > absolute + relative * largest
    strange = ~(np.isfinite(a) & np.isfinite(b))
    unequal = (a != b) & ~(np.isnan(a) & np.isnan(b))
    return np.where(strange, unequal, apart)
