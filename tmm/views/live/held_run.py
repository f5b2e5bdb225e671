"""A run that is looked at again only when one says so."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from tmm.core.metrics import FloatArray
from tmm.core.records import StepArray
from tmm.runs.recorded_run import Run

_ROW_BY_ROW = 64  # new steps at most; of more, whole series are read faster


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
        at_the_end = added == 0 or int(self._rows[-added:].min()) >= sum(earlier.rows)
        if added > _ROW_BY_ROW or added != len(self._steps) - earlier.steps or not at_the_end:
            return None
        return self._steps[earlier.steps :]
