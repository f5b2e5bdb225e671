"""The newest values of a record that grows by a step at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from tmm.layout import KeyInfo, StepRecord
from tmm.metrics import FloatArray
from tmm.reader import StepArray

_FIRST = 16  # what detectors call the beginning of a training, and a little more
_RECENT = 200  # the longest window of a detector
_SPARE = 64  # values that are moved together once there is no more room
_CAPACITY = _FIRST + _RECENT + _SPARE


class RecentSeries:
    """Of each key the first 16 values and at least the newest 200: 4.5 KB a key at most.

    It is a `Recorded` of the keys that the last step measured, so that what detectors find is of
    them. Histograms are left out.
    """

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}
        self._current: dict[str, _Track] = {}

    @staticmethod
    def remembered(steps: StepArray) -> list[int]:
        """Those of ``steps`` whose values are remembered where each key has one in each."""
        return sorted({*steps[:_FIRST].tolist(), *steps[-_RECENT:].tolist()})

    def add(self, record: StepRecord) -> None:
        """Take the values of a step; one that was taken before is replaced, with all after it."""
        current: list[_Track] = []
        for info, value in _numbers(record):
            track = self._tracks.get(info.key)
            if track is None:
                track = self._tracks[info.key] = _Track(info)
            track.add(record.step, value)
            current.append(track)
        current.sort(key=lambda track: track.info.position)
        self._current = {track.info.key: track for track in current}

    @property
    def steps(self) -> StepArray:
        """The steps of these keys that are still known: sorted, each once."""
        kept = [track.steps for track in self._current.values()]
        return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *kept]))

    def keys(self, pattern: str | None = None) -> list[str]:
        """The keys that ``pattern`` matches (`re.match`), in the order of execution."""
        return [key for key in self._current if pattern is None or re.match(pattern, key)]

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        """The steps and the values of ``key``; KeyError for an unknown one."""
        track = self._current[key]
        return track.steps.copy(), track.values.copy()

    def key_info(self, key: str) -> KeyInfo:
        """What is known of ``key``; KeyError for an unknown one."""
        return self._current[key].info


class _Track:
    """The first and the newest values of one key."""

    def __init__(self, info: KeyInfo) -> None:
        self.info = info
        self._count = 0
        self._steps: StepArray = np.empty(_FIRST, dtype=np.int64)
        self._values: FloatArray = np.empty(_FIRST)

    @property
    def steps(self) -> StepArray:
        return self._steps[: self._count]

    @property
    def values(self) -> FloatArray:
        return self._values[: self._count]

    def add(self, step: int, value: float) -> None:
        if self._count and step <= self._steps[self._count - 1]:
            self._count = int(np.searchsorted(self.steps, step))
        if self._count == len(self._steps):
            self._make_room()
        self._steps[self._count], self._values[self._count] = step, value
        self._count += 1

    def _make_room(self) -> None:
        if self._count < _CAPACITY:
            size = min(2 * self._count, _CAPACITY)
            self._steps, self._values = np.resize(self._steps, size), np.resize(self._values, size)
            return
        for array in (self._steps, self._values):
            array[_FIRST : _FIRST + _RECENT] = array[_FIRST + _SPARE :].copy()
        self._count -= _SPARE


def _numbers(record: StepRecord) -> Iterator[tuple[KeyInfo, float]]:
    for table in record.scalars:
        yield from zip(table.infos, table.values.tolist(), strict=True)
