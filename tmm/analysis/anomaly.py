"""What a detector found: something unusual in one series, over one stretch of steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from tmm.analysis.robust import runs
from tmm.analysis.series import BoolArray, Series
from tmm.core.metrics import FloatArray

Severity: TypeAlias = Literal["low", "medium", "high", "critical"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
"""From the mildest to the worst."""


class EqualWithNaN:
    """Base of frozen dataclasses (``eq=False``) in which NaN equals NaN."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash(_values(self))


def _values(item: Any) -> tuple[object, ...]:
    values = [getattr(item, field.name) for field in fields(item)]
    return tuple("NaN" if isinstance(v, float) and math.isnan(v) else v for v in values)


@dataclass(frozen=True, eq=False)
class Anomaly(EqualWithNaN):
    """One episode: recorded steps of ``key`` that follow one another are one.

    It lasts from ``step`` to ``last_step``, both included; ``value`` is the worst in it, and
    ``threshold`` what it was held against, in the units of the key. ``text`` says it in a sentence.
    """

    kind: str
    severity: Severity
    step: int
    last_step: int
    key: str
    site: str
    value: float
    threshold: float
    text: str

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"severity={self.severity!r} is none of {', '.join(SEVERITIES)}")


@dataclass(frozen=True, eq=False)
class Episode:
    """A stretch of a series: ``places`` in it, and the place of the worst value."""

    series: Series
    places: slice
    worst: int

    @property
    def value(self) -> float:
        """The worst value."""
        return float(self.series.values[self.worst])

    @property
    def first_step(self) -> int:
        """The step at which it begins."""
        return int(self.series.steps[self.places.start])

    @property
    def last_step(self) -> int:
        """The last step of it."""
        return int(self.series.steps[self.places.stop - 1])

    @property
    def count(self) -> int:
        """The number of recorded steps in it."""
        return int(self.places.stop - self.places.start)

    @property
    def when(self) -> str:
        """The steps in words."""
        if self.count == 1:
            return f"at step {self.first_step}"
        return f"from step {self.first_step} to {self.last_step}"

    def anomaly(self, kind: str, severity: Severity, threshold: float, text: str) -> Anomaly:
        """What there is to say of it."""
        return Anomaly(
            kind=kind,
            severity=severity,
            step=self.first_step,
            last_step=self.last_step,
            key=self.series.key,
            site=self.series.site,
            value=self.value,
            threshold=float(threshold),
            text=text,
        )


def episodes(
    series: Series, flagged: BoolArray, *, badness: FloatArray | None = None, least: int = 1
) -> Iterator[Episode]:
    """The runs of flagged values of ``series``, at least ``least`` long each.

    The worst value is that of the largest ``badness``, which is the value itself by default.
    """
    judged = series.values if badness is None else badness
    for places in runs(flagged, least):
        worst = places.start + int(np.nanargmax(judged[places]))
        yield Episode(series, places, worst)


def number(value: float) -> str:
    """A number for people, of four digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
