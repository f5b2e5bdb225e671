"""Reads the series of a run: all its segments as one, while it grows and afterwards."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from tmm.core.keys import key_of_rank
from tmm.core.metrics import FloatArray
from tmm.core.records import Event, KeyInfo, StepArray
from tmm.core.series_by_key import KnownKeys
from tmm.runtime.store.run_file import INFO_NAME, read_info
from tmm.runtime.store.segment_layout import ABSENT, is_measured, numbers_of, segment_paths
from tmm.runtime.store.segment_reader import SegmentReader

_Rows: TypeAlias = npt.NDArray[np.intp]

_NO_STEPS: StepArray = np.empty(0, dtype=np.int64)


class RunReader(KnownKeys):
    """What a run has recorded, of all its segments together.

    Every access sees what was recorded until then. A step that was recorded again, in the same
    segment or a later one, is what it was the last time, as a whole; its events stay. Where a run
    went back to an earlier step, what it had recorded from there on does not count. Keys that
    several segments hold are one series. Where ranks have recorded their own rows, keys name the
    rank, or with ``rank`` only those of that one are read. Damaged files raise ValueError.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int | None = None) -> None:
        self.path = Path(path).absolute()  # it reads later, too, when the program may be elsewhere
        self.rank = rank
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{self.path} is no folder; expected that of a run, with {INFO_NAME} "
                "and metrics-NNN.h5 in it"
            )
        if not (self.path / INFO_NAME).exists():
            raise ValueError(f"{self.path} is not the folder of a run: it has no {INFO_NAME}")
        self._closed = False
        self._segments: list[SegmentReader] = []  # oldest first
        self._own: dict[str, tuple[int | None, str]] = {}  # of a key: its rank, its name in there
        self._merged_sizes: tuple[int, ...] = ()
        self._merge()
        try:
            self.refresh()
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> dict[str, Any]:
        """What ``run.json`` holds."""
        return read_info(self.path)

    @property
    def steps(self) -> StepArray:
        """The recorded steps: sorted, each once."""
        self.refresh()
        return self._steps.copy()

    @property
    def events(self) -> list[Event]:
        """All events, in the order in which they were recorded."""
        self.refresh()
        return [
            event if rank is None else replace(event, text=f"rank {rank}: {event.text}")
            for segment in self._segments
            for rank in (self._named_rank(segment),)
            for event in segment.events
        ]

    @property
    def ranks(self) -> list[int]:
        """The ranks that have recorded their own rows; none of a run that has one row for all."""
        found = (numbers_of(path)[1] for path in segment_paths(self.path))
        return sorted({rank for rank in found if rank is not None})

    @property
    def histogram_edges(self) -> FloatArray | None:
        """The edges of the bins, shape (bins + 1,); None where the run has none."""
        self.refresh()
        edges = [segment.histogram_edges for segment in self._segments]
        return next((found for found in reversed(edges) if found is not None), None)

    def keys(self, pattern: str | None = None) -> list[str]:
        """Return the keys, histograms included, that ``pattern`` matches (`re.match`).

        They are in the order of execution, then of first appearance.
        """
        self.refresh()
        return super().keys(pattern)

    def key_info(self, key: str) -> KeyInfo:
        """Return what the newest segment says of ``key``; KeyError names the nearest keys."""
        self.refresh()
        return self._known(key)

    def is_histogram(self, key: str) -> bool:
        """Whether the values of ``key`` are histograms; KeyError names the nearest keys."""
        self.refresh()
        self._known(key)
        return self._is_histogram(key)

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        """Return the steps at which ``key`` was measured, shape (n,), and its values.

        The values have shape (n,), or (n, bins) for a histogram; NaN is a value. Raises KeyError,
        naming the nearest keys, and ValueError for a key that the segments disagree about.
        """
        self.refresh()
        self._known(key)
        rows, values, before = [], [], 0
        rank, name = self._own[key]
        for segment in self._segments:
            if self._named_rank(segment) == rank and segment.has(name):
                found, measurements = segment.series(name)
                rows.append(found + before)
                values.append(measurements)
            before += len(segment.steps)
        if len(shapes := {part.shape[1:] for part in values}) > 1:
            raise ValueError(f"segments hold {key!r} in the shapes {shapes}; read it with at(step)")
        return self._counting(np.concatenate(rows), np.concatenate(values))

    def _counting(self, rows: _Rows, values: FloatArray) -> tuple[StepArray, FloatArray]:
        """Of values in rows of all segments those that count, by step, and these."""
        places = self._places[rows]
        counts = (places >= 0) & is_measured(values)
        places, values = places[counts], values[counts]
        order = np.argsort(places, kind="stable")
        return self._steps[places[order]], values[order]

    def table(self, keys: Sequence[str]) -> tuple[StepArray, FloatArray, npt.NDArray[np.bool_]]:
        """Return many series at once, which is faster than one by one.

        The first are all recorded steps, shape (n,), then the values, shape (keys, n), NaN where
        a key was not measured, and whether it was, shape (keys, n). Raises KeyError, naming the
        nearest keys, and ValueError for a histogram.
        """
        self.refresh()
        if isinstance(keys, str):
            raise TypeError(f"keys={keys!r} is one text; give a list of keys: [{keys!r}]")
        for key in keys:
            self._known(key)
            if self._is_histogram(key):
                raise ValueError(f"{key!r} is a histogram; read it with series(key)")
        values = np.full((len(keys), len(self._steps)), ABSENT)
        before = 0
        for segment in self._segments:
            rank = self._named_rank(segment)
            own = np.flatnonzero([self._own[key][0] == rank for key in keys])
            part = segment.table([self._own[keys[n]][1] for n in own.tolist()])
            places = self._places[before : before + len(segment.steps)]
            before += len(segment.steps)
            if len(own) == len(keys) and np.array_equal(places, np.arange(len(self._steps))):
                values = part  # as of most runs
            else:
                values[own[:, None], places[places >= 0]] = part[:, places >= 0]
        measured = is_measured(values.ravel()).reshape(values.shape)
        values[~measured] = np.nan
        return self._steps.copy(), values, measured

    def at(self, step: int) -> dict[str, float | FloatArray]:
        """Return what was measured at ``step``: a number, or an array of shape (bins,), by key.

        The keys are in the order of `keys`. Raises KeyError, naming the nearest steps.
        """
        self.refresh()
        if not isinstance(step, (int, float, np.integer)):
            raise TypeError(f"step={step!r} is not a number")
        place = bisect_left(self._steps, step)
        if place == len(self._steps) or self._steps[place] != step:
            near = self._steps[max(0, place - 2) : place + 2].tolist()
            raise KeyError(f"step {step} was not recorded; nearest: {near}")
        found: dict[tuple[int | None, str], float | FloatArray] = {}
        before = 0
        for segment in self._segments:
            rank = self._named_rank(segment)
            rows = np.flatnonzero(self._places[before : before + len(segment.steps)] == place)
            before += len(segment.steps)
            for row in rows.tolist():
                found |= {(rank, name): value for name, value in segment.row(row).items()}
        return {key: found[own] for key, own in self._own.items() if own in found}

    def refresh(self) -> None:
        """Take in what was recorded since the last access; every access does this by itself."""
        if self._closed:
            raise ValueError(f"the run {self.path} is closed")
        opened = {segment.path for segment in self._segments}
        for path in segment_paths(self.path):
            if path not in opened and self.rank in (None, numbers_of(path)[1]):
                self._segments.append(SegmentReader(path))
        self._segments.sort(key=_order)
        for segment in self._segments:
            segment.refresh()
        sizes = tuple(len(segment.steps) for segment in self._segments)
        if sizes != self._merged_sizes:
            self._merge()
            self._merged_sizes = sizes

    def _merge(self) -> None:
        counting: list[tuple[_Rows, StepArray]] = []
        starts = np.cumsum([0, *(len(segment.steps) for segment in self._segments)])
        for rank in dict.fromkeys(map(self._named_rank, self._segments)):
            own = [n for n, s in enumerate(self._segments) if self._named_rank(s) == rank]
            counting.append(_counting_rows([self._segments[n] for n in own], starts[own].tolist()))
        steps = [steps for _, steps in counting]
        joined = steps[0] if len(steps) == 1 else np.concatenate([_NO_STEPS, *steps])
        self._steps = joined if len(steps) == 1 else np.unique(joined)
        self._places = np.full(int(starts[-1]), -1, dtype=np.intp)
        for rows, of in counting:
            self._places[rows] = np.searchsorted(self._steps, of)
        infos: dict[str, KeyInfo] = {}
        self._own = {}
        for segment in self._segments:
            rank = self._named_rank(segment)
            for name, info in (segment.infos | segment.histogram_infos).items():
                shown = info if rank is None else key_of_rank(info, rank)
                infos[shown.key], self._own[shown.key] = shown, (rank, name)
        self._infos = dict(sorted(infos.items(), key=lambda item: item[1].position))
        self._own = {key: self._own[key] for key in self._infos}

    def _named_rank(self, segment: SegmentReader) -> int | None:
        """The rank that keys of a segment name."""
        return numbers_of(segment.path)[1] if self.rank is None else None

    def _known(self, key: str) -> KeyInfo:
        if not isinstance(key, str):
            raise TypeError(f"key={key!r} is not text; table(keys) reads many series at once")
        return super()._known(key)

    def _is_histogram(self, key: str) -> bool:
        rank, name = self._own[key]
        return any(
            name in segment.histogram_infos
            for segment in self._segments
            if self._named_rank(segment) == rank
        )

    def close(self) -> None:
        """Close the files."""
        self._closed = True
        for segment in self._segments:
            segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _order(segment: SegmentReader) -> tuple[int, int]:
    number, rank = numbers_of(segment.path)
    return number, -1 if rank is None else rank


def _counting_rows(
    segments: Sequence[SegmentReader], starts: Sequence[int]
) -> tuple[_Rows, StepArray]:
    """The rows of segments, oldest first, that count, and their steps: sorted, each once.

    Rows are numbered from those of ``starts`` on.
    """
    border = math.inf
    rows, steps = [], [_NO_STEPS]
    for segment, start in zip(reversed(segments), reversed(starts), strict=True):
        found = np.flatnonzero(segment.measured & (segment.steps < border))
        rows.append(found[::-1] + start)
        steps.append(segment.steps[found][::-1])
        border = min(border, segment.replaces_from)
    # `unique` finds the first of equal steps, here the newest.
    unique, newest = np.unique(np.concatenate(steps), return_index=True)
    return np.concatenate([np.empty(0, dtype=np.intp), *rows])[newest], unique
