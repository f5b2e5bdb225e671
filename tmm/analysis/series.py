"""One series with what its key says, how a detector comes to those that it judges, a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tmm.core.keys import SKIPPED, is_total_loss, metric_of
from tmm.core.metrics import FloatArray
from tmm.core.records import KeyInfo, StepArray
from tmm.core.series_by_key import Recorded

BoolArray: TypeAlias = npt.NDArray[np.bool_]


_USUAL = 10.0  # which first losses of means seldom exceed: 10.8 is that of 50,000 classes


@dataclass(frozen=True, eq=False)
class Series:
    """The steps and the values of a key, both of shape (n,)."""

    info: KeyInfo
    steps: StepArray
    values: FloatArray

    @property
    def key(self) -> str:
        """The key."""
        return self.info.key

    @property
    def site(self) -> str:
        """What was measured."""
        return self.info.site

    @property
    def metric(self) -> str:
        """The metric at the end of the key; empty where there is none."""
        return metric_of(self.info)

    def where(self, chosen: BoolArray) -> Series:
        """The part that is ``chosen``, shape (n,)."""
        if chosen.all():
            return self
        return replace(self, steps=self.steps[chosen], values=self.values[chosen])

    def finite(self) -> Series:
        """The part whose values are finite."""
        return self.where(np.isfinite(self.values))

    def without(self, steps: StepArray) -> Series:
        """The part at other steps."""
        return self.where(~np.isin(self.steps, steps)) if len(steps) else self

    def on(self, steps: StepArray) -> FloatArray:
        """The values at ``steps``; NaN where there is none."""
        result = np.full(len(steps), np.nan)
        if len(self.steps):
            places = np.searchsorted(self.steps, steps).clip(max=len(self.steps) - 1)
            there = self.steps[places] == steps
            result[there] = self.values[places[there]]
        return result


def series_of(recorded: Recorded, choose: Callable[[KeyInfo], bool]) -> Iterator[Series]:
    """The series whose keys are chosen, in the order of execution; histograms are left out."""
    names = recorded.keys()
    for key in names:
        info = recorded.key_info(key)
        if choose(info):
            steps, values = recorded.series(key)
            if values.ndim == 1:
                yield Series(info, steps, values)


def is_metric(kind: str, *metrics: str) -> Callable[[KeyInfo], bool]:
    """Chooses the keys of these metrics of a family."""
    return lambda info: info.kind == kind and metric_of(info) in metrics


def is_of(*kinds: str) -> Callable[[KeyInfo], bool]:
    """Chooses the keys of these families."""
    return lambda info: info.kind in kinds


def named(recorded: Recorded, key: str) -> Series | None:
    """The series of ``key``, if there is one."""
    return next(series_of(recorded, lambda info: info.key == key), None)


def skipped_steps(recorded: Recorded) -> StepArray:
    """The steps that a ``GradScaler`` skipped: their gradients are infinite by design."""
    skipped = named(recorded, SKIPPED)
    return np.empty(0, dtype=np.int64) if skipped is None else skipped.steps[skipped.values > 0]


def loss_unit(recorded: Recorded) -> float:
    """How many times 10 the first loss is, 1 at the least.

    A loss that is a sum, or one of targets far from 1, has gradients and outputs of its own scale.
    A mean of usual terms begins below 10.
    """
    firsts = (s.finite().values[:1] for s in series_of(recorded, is_total_loss))
    return max(1.0, *(abs(float(values[0])) / _USUAL for values in firsts if len(values)), 1.0)


@dataclass(frozen=True)
class KeySummary:
    """One key: ``count`` values, of which ``nonfinite`` are NaN or infinite.

    The others are about the finite ones, None where there are none; of equal extremes the first.
    """

    key: str
    count: int
    nonfinite: int
    first: float | None = None
    last: float | None = None
    minimum: float | None = None
    minimum_step: int | None = None
    maximum: float | None = None
    maximum_step: int | None = None
    mean: float | None = None


def summarize(recorded: Recorded, pattern: str | None = None) -> tuple[KeySummary, ...]:
    """A summary of each key that ``pattern`` matches (`re.match`), in the order of execution.

    Histograms are left out. Raises ValueError for what is no regular expression.
    """
    chosen = set(recorded.keys(pattern))
    return tuple(_summary(series) for series in series_of(recorded, lambda i: i.key in chosen))


def _summary(series: Series) -> KeySummary:
    finite = series.finite()
    steps, values, count = finite.steps, finite.values, len(series.values)
    if not len(values):
        return KeySummary(series.key, count, count)
    lowest, highest = int(np.argmin(values)), int(np.argmax(values))
    return KeySummary(
        key=series.key,
        count=count,
        nonfinite=count - len(values),
        first=float(values[0]),
        last=float(values[-1]),
        minimum=float(values[lowest]),
        minimum_step=int(steps[lowest]),
        maximum=float(values[highest]),
        maximum_step=int(steps[highest]),
        mean=_mean(values),
    )


def _mean(values: FloatArray) -> float:
    """The mean, also of numbers whose sum would overflow."""
    largest = float(np.abs(values).max())
    return float(np.mean(values / largest)) * largest if largest > 1e300 else float(values.mean())
