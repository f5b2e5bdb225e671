"""What the analysis reads beside a run on disk: series in memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from tmm.core.keys import info_of
from tmm.core.metrics import FloatArray
from tmm.core.records import KeyInfo, StepArray
from tmm.core.series_by_key import KnownKeys, Recorded, joined_steps


class RecordedSeries(KnownKeys):
    """Series in memory: key to steps and values, both of shape (n,).

    The order of the mapping is that of execution. Families, sites and metrics are read off the
    keys. Raises ValueError for steps that do not increase, or are not as many as the values.
    """

    def __init__(self, series: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]]) -> None:
        self._series: dict[str, tuple[StepArray, FloatArray]] = {}
        infos: dict[str, KeyInfo] = {}
        positions: dict[tuple[str, str], int] = {}
        for key, (steps, values) in series.items():
            self._series[key] = _checked(key, steps, values)
            info = info_of(key)
            position = positions.setdefault((info.kind, info.site), len(positions))
            infos[key] = info_of(key, position)
        self._infos = dict(sorted(infos.items(), key=lambda item: item[1].position))

    @property
    def steps(self) -> StepArray:
        """The steps of all series: sorted, each once."""
        return joined_steps(steps for steps, _ in self._series.values())

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        """The steps and the values of ``key``; KeyError for an unknown one."""
        steps, values = self._series[key]
        return steps.copy(), values.copy()


class ReadOnce(KnownKeys):
    """A view of a record in which every series is read at the first access, and stays as it is.

    Many detectors read the same series, from a file that may grow meanwhile.
    """

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded
        self._steps = recorded.steps
        names = recorded.keys()
        self._infos = {key: recorded.key_info(key) for key in names}
        self._series: dict[str, tuple[StepArray, FloatArray]] = {}

    @property
    def steps(self) -> StepArray:
        """The steps, as of the beginning."""
        return self._steps

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        """The steps and the values of ``key``, not to be changed."""
        if key not in self._series:
            self._series[key] = self._recorded.series(key)
            for array in self._series[key]:
                array.setflags(write=False)
        return self._series[key]


def _checked(key: str, steps: npt.ArrayLike, values: npt.ArrayLike) -> tuple[StepArray, FloatArray]:
    step_array = np.array(steps, dtype=np.int64)
    value_array = np.array(values, dtype=np.float64)
    if step_array.ndim != 1 or step_array.shape != value_array.shape:
        raise ValueError(
            f"{key!r} has steps of shape {step_array.shape} and values of shape"
            f" {value_array.shape}; both should be (n,)"
        )
    if (np.diff(step_array) <= 0).any():
        raise ValueError(f"{key!r}: the steps should increase")
    return step_array, value_array
