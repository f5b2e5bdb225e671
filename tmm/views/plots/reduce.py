"""Fewer points than steps, without losing an extreme or a value that is not finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tmm.analysis.series import BoolArray
from tmm.core.metrics import FloatArray
from tmm.core.records import StepArray

FlagArray: TypeAlias = npt.NDArray[np.uint8]

FINITE, NAN, PLUS_INFINITY, MINUS_INFINITY = 1, 2, 4, 8
"""What the values of a bucket are, as bits; 0 where none was measured."""

Worst: TypeAlias = Literal["farthest from zero", "largest", "smallest"]
"""Which value of a bucket stands for it in a heat map."""

_SMALL_IS_BAD = frozenset(("attention_entropy", "attention_normalized_entropy", "cosine", "min"))
_LARGE_IS_BAD = frozenset(("attention_logsumexp", "attention_max_logit", "max"))


@dataclass(frozen=True, eq=False)
class Reduced:
    """Values of several keys in buckets of steps that follow one another.

    Column c is of the steps from ``first[c]`` to ``last[c]``. ``low`` and ``high``, shape (keys,
    columns), are the least and the largest finite value (NaN where there is none), and ``flags``
    says what there was (`FINITE` and the others). ``steps`` is the number of steps before.
    """

    first: StepArray
    last: StepArray
    low: FloatArray
    high: FloatArray
    flags: FlagArray
    steps: int

    @property
    def columns(self) -> int:
        """The number of buckets."""
        return len(self.first)

    @property
    def is_whole(self) -> bool:
        """Whether each column is one step, so that nothing is lost."""
        return self.columns == self.steps

    def worst(self, which: Worst) -> FloatArray:
        """One finite value for each bucket, shape (keys, columns); NaN where there is none."""
        if which == "smallest":
            return self.low
        if which == "largest":
            return self.high
        return np.where(np.abs(self.low) > np.abs(self.high), self.low, self.high)

    def value_shown(self, which: Worst) -> str:
        """In words, which value of a bucket `worst` gives."""
        if which == "farthest from zero":
            is_positive = not (self.low < 0).any()
            return "the largest" if is_positive else "the value farthest from zero"
        return f"the {which}"

    def note(self, which: Worst) -> str:
        """What was reduced, in words; empty where nothing was."""
        if self.is_whole:
            return ""
        return (
            f"{self.steps:,} steps shown as {self.columns:,} columns: each shows"
            f" {self.value_shown(which)} of its steps; NaN and infinities win"
        )


def worst_of(family: str, metric: str) -> Worst:
    """Which value of a bucket is the worst for a metric: large ones, but for entropies and such."""
    for name in (family, metric):
        if name in _SMALL_IS_BAD:
            return "smallest"
        if name in _LARGE_IS_BAD:
            return "largest"
    return "farthest from zero"


def reduce_table(
    steps: StepArray, values: FloatArray, measured: BoolArray, columns: int
) -> Reduced:
    """Reduce ``values``, shape (keys, steps), to at most ``columns`` buckets of equal size.

    Steps at which no key was measured are left out before. Raises ValueError for ``columns`` < 1.
    """
    if columns < 1:
        raise ValueError(f"columns={columns} should be at least 1")
    used = measured.any(axis=0)
    if not used.all():
        steps, values, measured = steps[used], values[:, used], measured[:, used]
    count = len(steps)
    starts = _starts(count, columns)
    if not count:
        empty = np.empty((len(values), 0))
        return Reduced(steps, steps, empty, empty, empty.astype(np.uint8), 0)
    finite = np.isfinite(values) & measured
    low = np.minimum.reduceat(np.where(finite, values, np.inf), starts, axis=1)
    high = np.maximum.reduceat(np.where(finite, values, -np.inf), starts, axis=1)
    any_finite = np.logical_or.reduceat(finite, starts, axis=1)
    low[~any_finite] = high[~any_finite] = np.nan
    flags = any_finite * np.uint8(FINITE)
    strange = measured & ~finite
    if strange.any():
        for bit, kind in (
            (NAN, np.isnan(values)),
            (PLUS_INFINITY, values == np.inf),
            (MINUS_INFINITY, values == -np.inf),
        ):
            flags |= np.logical_or.reduceat(strange & kind, starts, axis=1) * np.uint8(bit)
    ends = np.append(starts[1:], count) - 1
    return Reduced(steps[starts], steps[ends], low, high, flags, count)


def thin(values: FloatArray, most: int) -> npt.NDArray[np.intp]:
    """Places, in order, of at most ``most`` of ``values``, shape (n,), that draw the same curve.

    All of them where they are few enough. Otherwise of each bucket the first, the last, the least
    and the largest finite value, and the first NaN and the first infinity of each sign. Raises
    ValueError for ``most`` < 7.
    """
    kinds = 7  # of points in a bucket
    if most < kinds:
        raise ValueError(f"most={most} should be at least {kinds}")
    if len(values) <= most:
        return np.arange(len(values))
    strange = not np.isfinite(values).all()
    kept: list[int] = []
    starts = _starts(len(values), most // (kinds if strange else 4))
    for start, stop in zip(starts, np.append(starts[1:], len(values)), strict=True):
        part = values[start:stop]
        finite = np.flatnonzero(np.isfinite(part))
        places = [0, len(part) - 1]
        if len(finite):
            places += [finite[np.argmin(part[finite])], finite[np.argmax(part[finite])]]
        if len(finite) < len(part):
            for kind in (np.isnan(part), part == np.inf, part == -np.inf):
                places += np.flatnonzero(kind)[:1].tolist()
        kept += [int(start) + int(place) for place in places]
    return np.unique(np.array(kept, dtype=np.intp))


def _starts(count: int, buckets: int) -> npt.NDArray[np.intp]:
    """Where buckets of (almost) equal size begin; no bucket is empty."""
    buckets = min(count, buckets)
    return (np.arange(buckets, dtype=np.intp) * count) // max(1, buckets)
