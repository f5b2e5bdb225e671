"""A run as it is now, read once: what a page says of it is of one moment."""

from __future__ import annotations

import numpy as np

from tmm.analysis.series import BoolArray
from tmm.core.metrics import FloatArray
from tmm.core.records import Event, StepArray
from tmm.core.series_by_key import KnownKeys
from tmm.runs.recorded_run import Run


class Snapshot(KnownKeys):
    """The numbers of a run in memory; what analysis reads (`tmm.analysis.Recorded`).

    Histograms are left out, and counted in ``histograms``. Raises ValueError for damaged files.
    """

    def __init__(self, run: Run) -> None:
        names = run.keys()
        self._infos = {key: run.key_info(key) for key in names if not run.is_histogram(key)}
        self.histograms = len(names) - len(self._infos)
        self.events: list[Event] = run.events
        self._rows = {key: row for row, key in enumerate(self._infos)}
        self.steps, self._values, self._measured = run.table(list(self._infos))
        for array in (self.steps, self._values, self._measured):
            array.setflags(write=False)

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        """The steps and the values of ``key``, not to be changed."""
        row = self._rows[key]
        measured = self._measured[row]
        if measured.all():
            return self.steps, self._values[row]
        return self.steps[measured], self._values[row][measured]

    def table(self, keys: tuple[str, ...]) -> tuple[StepArray, FloatArray, BoolArray]:
        """As ``Run.table``."""
        rows = np.array([self._rows[key] for key in keys], dtype=np.intp)
        return self.steps, self._values[rows], self._measured[rows]
