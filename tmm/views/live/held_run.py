"""A run that is looked at again only when one says so, and series of it that are kept."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np

from tmm.core.metrics import FloatArray
from tmm.core.records import StepArray
from tmm.runs.recorded_run import Run

_ROW_BY_ROW = 64  # new steps at most; of more, whole series are read faster

_Rows: TypeAlias = Sequence[tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True)
class Extent:
    """How much of a run was read: rows of each segment, and different steps in them."""

    rows: tuple[int, ...] = ()
    steps: int = 0


class HeldRun(Run):
    """A run as of the last `catch_up`.

    A `Run` looks at its files at each access: thousands of accesses to one that grows are slow, and
    each of them sees another run. Series with equal steps share them here, because detectors keep
    all series, and steps are half of that: the arrays are not to be changed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._shared_steps: StepArray = np.empty(0, dtype=np.int64)
        super().__init__(path)
        try:
            self.catch_up()
        except BaseException:
            self.close()
            raise

    def refresh(self) -> None:
        """Do nothing: every access sees what was there at the last `catch_up`."""

    def catch_up(self) -> Extent:
        """Take in what was recorded since; raises OSError and ValueError as `Run` does."""
        super().refresh()
        return self.extent

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        """The steps and the values of ``key``, as of the last `catch_up`."""
        steps, values = super().series(key)
        if not np.array_equal(steps, self._shared_steps):
            self._shared_steps = steps
        return self._shared_steps, values

    @property
    def extent(self) -> Extent:
        """How much there is."""
        return Extent(self._merged_sizes, len(self._steps))

    def steps_since(self, earlier: Extent) -> StepArray | None:
        """The steps that follow those of ``earlier``; None where series are to be read anew.

        That is the case after many steps, in a new segment, and where a step was recorded again.
        """
        if not earlier.rows or len(earlier.rows) != len(self._merged_sizes):
            return None
        if earlier.rows[:-1] != self._merged_sizes[:-1]:
            return None
        added = int(self._segments[-1].measured[earlier.rows[-1] :].sum())
        new = self._places[sum(earlier.rows) :]
        last = np.arange(len(self._steps) - added, len(self._steps))
        at_the_end = np.array_equal(np.sort(new[new >= 0]), last)
        if added > _ROW_BY_ROW or added != len(self._steps) - earlier.steps or not at_the_end:
            return None
        return self._steps[earlier.steps :]


@dataclass(frozen=True, eq=False)
class KnownSeries:
    """The steps and values of a key, as of an ``extent`` of the run; both of shape (n,).

    Of a histogram they are the newest step, shape (1,), and its bins, shape (1, bins).
    """

    steps: StepArray
    values: FloatArray
    extent: Extent

    @property
    def is_histogram(self) -> bool:
        """Whether the values are bins."""
        return self.values.ndim == 2


class SeriesCache:
    """The series of a few keys of ``run``, kept: of a run that grew, only what is new is read.

    They are as of its last `HeldRun.catch_up`.
    """

    def __init__(self, run: HeldRun) -> None:
        self._run = run
        self._known: dict[str, KnownSeries] = {}

    def read(self, keys: Sequence[str]) -> Mapping[str, KnownSeries]:
        """The series of ``keys``, which the run must have; all others are forgotten."""
        extent = self._run.extent
        rows: dict[Extent, _Rows | None] = {}  # most keys were read up to the same place
        found: dict[str, KnownSeries] = {}
        for key in keys:
            known = self._known.get(key)
            if known is not None and known.extent not in rows:
                rows[known.extent] = self._rows_since(known.extent)
            new = None if known is None else rows[known.extent]
            if known is None or new is None:
                found[key] = self._anew(key, extent)
            else:
                found[key] = _extended(known, key, new, extent)
        self._known = found
        return found

    def _rows_since(self, earlier: Extent) -> _Rows | None:
        steps = self._run.steps_since(earlier)
        return None if steps is None else [(step, self._run.at(step)) for step in steps.tolist()]

    def _anew(self, key: str, extent: Extent) -> KnownSeries:
        try:
            steps, values = self._run.series(key)
        except ValueError:  # a number in one segment, a histogram in another: the newest step has
            last = int(self._run.steps[-1])  # one of them, or neither
            newest = [value] if (value := self._run.at(last).get(key)) is not None else []
            steps, values = np.array([last][: len(newest)], dtype=np.int64), np.array(newest)
        kept = slice(-1, None) if values.ndim == 2 else slice(None)
        return KnownSeries(steps[kept], values[kept], extent)


def _extended(known: KnownSeries, key: str, rows: _Rows, extent: Extent) -> KnownSeries:
    new = [(step, row[key]) for step, row in rows if key in row]
    if not new:
        return replace(known, extent=extent)
    steps, values = np.array([step for step, _ in new]), np.array([value for _, value in new])
    if known.is_histogram:
        return KnownSeries(steps[-1:], values[-1:], extent)
    steps = np.concatenate([known.steps, steps])
    return KnownSeries(steps, np.concatenate([known.values, values]), extent)
