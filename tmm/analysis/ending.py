"""Which episodes may end with the newest values: all that a detector must look at, step by step."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np

from tmm.analysis.anomaly import Severity
from tmm.analysis.recent import Newest
from tmm.analysis.robust import is_above_median, jumps_now
from tmm.analysis.series import BoolArray, Series
from tmm.core.records import KeyInfo


@dataclass(frozen=True, eq=False)
class Ending:
    """Of newest values, shape (n,): with which an episode can end.

    It is ``sure`` to, if one ended with the value before.
    """

    possible: BoolArray
    sure: BoolArray

    @classmethod
    def of(
        cls,
        newest: Newest,
        possible: BoolArray,
        sure: BoolArray | None = None,
        *,
        unless_skipped: bool = False,
    ) -> Ending:
        """Values that are flagged, surely so by default; what is not finite never is."""
        possible = possible & np.isfinite(newest.values)
        if unless_skipped and newest.skipped_within(1):
            possible = np.zeros(len(newest), dtype=np.bool_)
        return cls(possible, possible if sure is None else possible & sure)

    @classmethod
    def above(cls, limit: float) -> Callable[[Newest], Ending]:
        """Judges by values above a limit."""
        return lambda newest: cls.of(newest, newest.values > limit)

    @classmethod
    def below(cls, limit: float) -> Callable[[Newest], Ending]:
        """Judges by values below a limit."""
        return lambda newest: cls.of(newest, newest.values < limit)

    @classmethod
    def where(
        cls, newest: Newest, possible: BoolArray, is_sure: Callable[[Series], bool]
    ) -> Ending:
        """Values of which ``is_sure`` tells whether they are flagged."""
        possible = possible & np.isfinite(newest.values)
        sure = np.zeros(len(newest), dtype=np.bool_)
        for place in np.flatnonzero(possible).tolist():
            sure[place] = is_sure(newest.series(place))
        return cls(sure, sure)


@dataclass(frozen=True)
class EndsWith:
    """What tells with which newest values the episodes of one kind end, ``worst`` at the worst.

    ``chooses`` picks their keys, ``ending`` judges the newest values of these. Keys with the same
    ``group`` are judged together, and with those that the detector ``reads`` besides.
    """

    kind: str
    worst: Severity
    chooses: Callable[[KeyInfo], bool]
    ending: Callable[[Newest], Ending]
    group: Callable[[KeyInfo], Hashable] | None = None
    reads: Callable[[KeyInfo], bool] | None = None


def any_finite(newest: Newest) -> Ending:
    """An episode may end with any value."""
    return Ending.of(newest, np.isfinite(newest.values), np.zeros(len(newest), dtype=np.bool_))


def jumping(newest: Newest, *, factor: float, score: float, window: int, least: int) -> Ending:
    """Values that `tmm.analysis.robust.jumps` flags; of some it is only possible."""
    far, unknown = jumps_now(
        *(newest.values, newest.before(window)), factor=factor, score=score, least=least
    )
    for place in np.flatnonzero(far):
        values = newest.series(int(place)).values
        far[place] = is_above_median(values[-1], values[:-1])
    return Ending.of(newest, far | unknown, far)
