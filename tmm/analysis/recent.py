"""The newest values of a record that grows by a step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tmm.analysis.order import Rank, execution_ranks
from tmm.analysis.series import Series
from tmm.core.keys import GRAD_SCALE, SKIPPED
from tmm.core.metrics import FloatArray
from tmm.core.records import KeyInfo, StepArray, StepRecord
from tmm.core.series_by_key import KnownKeys, joined_steps

_FIRST = 16  # what detectors call the beginning of a training, and a little more
_RECENT = 200  # the longest window of a detector
_SPARE = 64  # values that are moved together once there is no more room
_OF_SCALER = (SKIPPED, GRAD_SCALE)
_CAPACITY = _FIRST + _RECENT + _SPARE


class RecentSeries(KnownKeys):
    """Of each key the first 16 values and at least the newest 200: 4.5 KB a key at most.

    It is a `Recorded` of the keys that the last step measured, so that what detectors find is of
    them. Histograms are left out.
    """

    def __init__(self) -> None:
        self._tracks: dict[str, _Track] = {}
        self._current: dict[str, _Track] = {}
        self._infos: dict[str, KeyInfo] = {}  # of the current ones
        self._chosen: dict[Callable[[KeyInfo], bool], tuple[_Track, ...]] = {}
        self._ranks: dict[str, Rank] | None = None
        self._around: RecentSeries | None = None

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
        if current != list(self._current.values()):
            self._know({track.info.key: track for track in current})
            self._chosen.clear()
            self._ranks = None

    def newest(self, choose: Callable[[KeyInfo], bool]) -> Newest:
        """The newest values of the keys that are chosen, in the order of execution."""
        if choose not in self._chosen:
            tracks = self._current.values()
            self._chosen[choose] = tuple(track for track in tracks if choose(track.info))
        scaler = [track for key in _OF_SCALER if (track := self._current.get(key)) is not None]
        return Newest(self._chosen[choose], scaler)

    def chosen(self, choose: Callable[[KeyInfo], bool]) -> list[str]:
        """The keys that are chosen, in the order of execution."""
        return [key for key, info in self._infos.items() if choose(info)]

    def part(self, keys: frozenset[str]) -> RecentSeries:
        """A view of ``keys`` alone, as of now, and of what is known of a ``GradScaler``."""
        view, kept = RecentSeries(), keys.union(_OF_SCALER)
        view._know({key: track for key, track in self._current.items() if key in kept})
        view._around = self
        return view

    def _know(self, current: dict[str, _Track]) -> None:
        self._current = current
        self._infos = {key: track.info for key, track in current.items()}

    @property
    def ranks(self) -> dict[str, Rank]:
        """What orders the keys; see `execution_ranks`."""
        if self._ranks is None:
            self._ranks = execution_ranks(self)
        return self._ranks

    @property
    def steps(self) -> StepArray:
        """The steps of these keys that are still known: sorted, each once."""
        if self._around is not None:
            return self._around.steps
        return joined_steps(track.steps for track in self._current.values())

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        """The steps and the values of ``key``; KeyError for an unknown one."""
        track = self._current[key]
        return track.steps.copy(), track.values.copy()


class Newest:
    """The newest values of some keys, shape (n,), and what is known of each.

    ``scaler`` is what is known of a ``GradScaler``, if there is one.
    """

    def __init__(self, tracks: Sequence[_Track], scaler: Sequence[_Track]) -> None:
        self.has_scaler = bool(scaler)
        self._scaler = scaler
        self.values: FloatArray = np.array([track.newest for track in tracks])
        self._tracks = tracks

    def skipped_within(self, count: int) -> bool:
        """Whether a ``GradScaler`` skipped one of the last ``count`` steps of the optimizer."""
        skipped = (track for track in self._scaler if track.info.key == SKIPPED)
        return any((track.values[-count:] > 0).any() for track in skipped)

    def info(self, place: int) -> KeyInfo:
        """What is known of a key."""
        return self._tracks[place].info

    def series(self, place: int) -> Series:
        """All that is remembered of a key; not to be kept."""
        track = self._tracks[place]
        return Series(track.info, track.steps, track.values)

    def __len__(self) -> int:
        return len(self._tracks)

    def before(self, count: int) -> FloatArray:
        """The last ``count`` values before the newest, shape (n, count); NaN where there are fewer.

        The newer ones are on the right.
        """
        result = np.full((len(self._tracks), count), np.nan)
        for row, track in zip(result, self._tracks, strict=True):
            values = track.values[:-1][-count:]
            row[count - len(values) :] = values
        return result


class _Track:
    """The first and the newest values of one key."""

    def __init__(self, info: KeyInfo) -> None:
        self.info = info
        self.newest = np.nan
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
        self.newest = value

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
