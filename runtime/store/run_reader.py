"""Reads the series of a run: all its segments as one, while it grows and afterwards."""

from __future__ import annotations

import math
import os
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from tmm.core.metrics import FloatArray
from tmm.core.records import Event, KeyInfo, StepArray
from tmm.core.series_by_key import KnownKeys
from tmm.runtime.store.run_file import INFO_NAME, read_info
from tmm.runtime.store.segment_layout import is_measured, segment_paths
from tmm.runtime.store.segment_reader import SegmentReader

_Rows: TypeAlias = npt.NDArray[np.intp]

_NO_STEPS: StepArray = np.empty(0, dtype=np.int64)


class RunReader(KnownKeys):
    """What a run has recorded, of all its segments together.

    Every access sees what was recorded until then. A step that was recorded again, in the same
    segment or a later one, is what it was the last time, as a whole; its events stay. Where a run
    went back to an earlier step, what it had recorded from there on does not count. Keys that
    several segments hold are one series. Damaged files raise ValueError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(
                f"{self.path} is no folder; expected that of a run, with {INFO_NAME} "
                "and metrics-NNN.h5 in it"
            )
        if not (self.path / INFO_NAME).exists():
            raise ValueError(f"{self.path} is not the folder of a run: it has no {INFO_NAME}")
        self._closed = False
        self._segments: list[SegmentReader] = []  # oldest first
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
        return [event for segment in self._segments for event in segment.events]

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
        for segment in self._segments:
            if segment.has(key):
                found, measurements = segment.series(key)
                rows.append(found + before)
                values.append(measurements)
            before += len(segment.steps)
        if len(shapes := {part.shape[1:] for part in values}) > 1:
            raise ValueError(f"segments hold {key!r} in the shapes {shapes}; read it with at(step)")
        return self._counting(np.concatenate(rows), np.concatenate(values))

    def _counting(self, rows: _Rows, values: FloatArray) -> tuple[StepArray, FloatArray]:
        """Of values in rows of all segments those that count, by step, and these."""
        places = np.full(sum(len(segment.steps) for segment in self._segments), -1)
        places[self._rows] = np.arange(len(self._rows))
        places = places[rows]
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
        parts = [segment.table(keys) for segment in self._segments]
        values = parts[0] if len(parts) == 1 else np.hstack([np.empty((len(keys), 0)), *parts])
        if not np.array_equal(self._rows, np.arange(values.shape[1])):
            values = values[:, self._rows]
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
        row = int(self._rows[place])
        for segment in self._segments:
            if row < len(segment.steps):
                values = segment.row(row)
                return {key: values[key] for key in self._infos if key in values}
            row -= len(segment.steps)
        raise AssertionError("every merged row lies in a segment")

    def refresh(self) -> None:
        """Take in what was recorded since the last access; every access does this by itself."""
        if self._closed:
            raise ValueError(f"the run {self.path} is closed")
        opened = {segment.path for segment in self._segments}
        for path in segment_paths(self.path):
            if path not in opened:
                self._segments.append(SegmentReader(path))
        self._segments.sort(key=lambda segment: (len(segment.path.name), segment.path.name))
        for segment in self._segments:
            segment.refresh()
        sizes = tuple(len(segment.steps) for segment in self._segments)
        if sizes != self._merged_sizes:
            self._merge()
            self._merged_sizes = sizes

    def _merge(self) -> None:
        steps = np.concatenate([_NO_STEPS, *(segment.steps for segment in self._segments)])
        border = math.inf
        counting = [np.empty(0, dtype=np.bool_)]
        for segment in reversed(self._segments):
            counting.append(segment.measured & (segment.steps < border))
            border = min(border, segment.replaces_from)
        rows = np.flatnonzero(np.concatenate(counting[::-1]))
        # `unique` finds the first of equal steps; reversed, it is the newest.
        self._steps, newest = np.unique(steps[rows][::-1], return_index=True)
        self._rows = rows[::-1][newest]
        infos: dict[str, KeyInfo] = {}
        for segment in self._segments:
            infos |= segment.infos | segment.histogram_infos
        self._infos = dict(sorted(infos.items(), key=lambda item: item[1].position))

    def _known(self, key: str) -> KeyInfo:
        if not isinstance(key, str):
            raise TypeError(f"key={key!r} is not text; table(keys) reads many series at once")
        return super()._known(key)

    def _is_histogram(self, key: str) -> bool:
        return any(key in segment.histogram_infos for segment in self._segments)

    def close(self) -> None:
        """Close the files."""
        self._closed = True
        for segment in self._segments:
            segment.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
