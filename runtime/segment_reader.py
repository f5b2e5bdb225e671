"""Reads one segment of a run: what its writer has committed, while it grows or afterwards.

Not in SWMR mode. There HDF5 shares one state among all who have a file open in a process, which
breaks refreshing with two readers, and any reading beside a writer that failed; and it meets a
wrong checksum with waits that double a hundred times, so that a damaged file hangs. Instead a file
is opened anew when there is more in it. The order in which a SWMR writer writes keeps every such
view consistent; a read in the very moment of a write may fail, and is done again.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np

from tmm.layout import Event, KeyInfo
from tmm.metrics import FloatArray
from tmm.runtime.file_view import FileView
from tmm.runtime.matrix import ABSENT, is_measured
from tmm.runtime.segment import COMMIT_FIELDS, FORMAT, MATRICES

_CACHE_BYTES = 32 << 20  # the chunks of one series of 16,000 rows, so that its neighbours come free
_CACHE_SLOTS = 10_007  # many times the number of chunks in the cache, and a prime
_PAUSES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # seconds between attempts
_CLOCK_SECONDS = 2.0  # more than the resolution of a file's time of change

_Result = TypeVar("_Result")


class SegmentReader:
    """What is committed in a segment, as of the last `refresh`.

    ``steps`` and ``measured`` have one element per row; ``infos`` and ``histogram_infos`` map keys
    in the order of their columns; steps of earlier segments count below ``replaces_from`` only.
    Raises ValueError, naming the file, where it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps = np.empty(0, dtype=np.int64)
        self.measured = np.empty(0, dtype=np.bool_)
        self.infos: dict[str, KeyInfo] = {}
        self.histogram_infos: dict[str, KeyInfo] = {}
        self.events: list[Event] = []
        self._places: dict[str, tuple[str, int]] = {}  # of a key: its dataset and column
        self._widths = dict.fromkeys(MATRICES, 0)  # columns of the datasets
        self._rows = {name: np.empty(0, dtype=np.intp) for name in MATRICES}  # which step each is
        self._texts = dict.fromkeys((*MATRICES.values(), "events"), 0)  # bytes read so far
        self._file: Any = None
        self._datasets: dict[str, Any] = {}
        self._seen: tuple[int, int] | None = None
        self.replaces_from = math.inf
        self.histogram_edges: FloatArray | None = self._attempt(self._read_edges)
        self.refresh()

    def refresh(self) -> bool:
        """Take in what was committed since the last time; tell whether there was anything."""
        status = os.stat(self.path)
        seen = (status.st_size, status.st_mtime_ns)
        if seen == self._seen:
            return False
        grown = self._attempt(self._take_in)
        # What changed just now may change again without another time of change.
        self._seen = seen if time.time() - status.st_mtime > _CLOCK_SECONDS else None
        return grown

    def _take_in(self) -> bool:
        file = _open(self.path)
        try:
            grown = len(file["steps"]) > len(self.steps)
            if grown:
                self._take_rows(file)
                self.close()
                self._file = file
            return grown
        finally:
            if file is not self._file:
                file.close()

    def _take_rows(self, file: Any) -> None:
        # Of ``steps`` only the length is needed, as ``commits`` has the numbers too.
        commits = file["commits"][len(self.steps) : len(file["steps"])]
        last = dict(zip(COMMIT_FIELDS, commits[-1].tolist(), strict=True))
        size = os.stat(self.path).st_size
        if not 0 < last["file_bytes"] <= size:
            raise ValueError(f"it was cut off at {size} bytes")
        ends = dict(zip(self._texts, commits[-1, 3:-3].tolist(), strict=True))
        *keys, events = (
            _lines(file[name][start : ends[name]]) for name, start in self._texts.items()
        )
        for name, lines in zip(MATRICES, keys, strict=True):
            infos = self.histogram_infos if name == "histograms" else self.infos
            for info in lines:
                self._places[info["key"]] = name, self._widths[name]
                self._widths[name] += 1
                infos[info["key"]] = KeyInfo(**info)
        for name, counts in zip(MATRICES, commits[:, -3:].T, strict=True):
            known = self._rows[name]
            new = np.flatnonzero(np.diff(counts, prepend=len(known))) + len(self.steps)
            self._rows[name] = np.concatenate([known, new])
        self.events.extend(Event(**event) for event in events)
        self.steps = np.concatenate([self.steps, commits[:, 0]])
        self.measured = np.concatenate([self.measured, commits[:, 1] != 0])
        self._texts = ends

    def series(self, key: str) -> FloatArray:
        """Return shape (rows,), or (rows, bins) for a histogram; `ABSENT` where not measured."""
        name, column = self._places[key]

        def read() -> FloatArray:
            dataset, rows = self._dataset(name), self._rows[name]
            result = np.full((len(self.steps), *dataset.shape[2:]), ABSENT)
            result[rows] = dataset[: len(rows), column]
            return result

        return self._attempt(read)

    def table(self, keys: Sequence[str]) -> FloatArray:
        """Return the numbers of ``keys``, shape (keys, rows); `ABSENT` where not measured.

        Each chunk of the file is read once. Keys that the segment lacks are not measured.
        """

        def read() -> FloatArray:
            result = np.full((len(keys), len(self.steps)), ABSENT)
            for name in MATRICES:
                own = [n for n, key in enumerate(keys) if self._dataset_of(key) == name]
                places = np.array(own, dtype=np.intp)
                columns = np.array([self._places[keys[n]][1] for n in own], dtype=np.intp)
                dataset, rows = self._dataset(name), self._rows[name]
                width = dataset.chunks[1]
                for start in np.unique(columns // width) * width:
                    here = (columns >= start) & (columns < start + width)
                    block = dataset[: len(rows), start : start + width]
                    result[np.ix_(places[here], rows)] = block[:, columns[here] - start].T
            return result

        return self._attempt(read)

    def _dataset_of(self, key: str) -> str | None:
        """Where the numbers of a key are; None for one that has none here."""
        return self._places[key][0] if key in self.infos else None

    def row(self, index: int) -> dict[str, float | FloatArray]:
        """Return what was measured in a row: a number or an array of shape (bins,) by key."""

        def read() -> dict[str, float | FloatArray]:
            rows: dict[str, tuple[Sequence[float] | FloatArray, Sequence[bool]]] = {}
            for name, width in self._widths.items():
                place = int(np.searchsorted(self._rows[name], index))
                if place < len(self._rows[name]) and self._rows[name][place] == index:
                    values = self._dataset(name)[place, :width]
                    plain = values.tolist() if values.ndim == 1 else values
                    rows[name] = plain, is_measured(values).tolist()
            result: dict[str, float | FloatArray] = {}
            for key, (name, column) in self._places.items():
                if name in rows and rows[name][1][column]:
                    result[key] = rows[name][0][column]
            return result

        return self._attempt(read)

    def _read_edges(self) -> FloatArray | None:
        file = self._opened()
        if file.attrs["format"] != FORMAT:
            raise ValueError(f"its format is {file.attrs['format']}, not {FORMAT}")
        self.replaces_from = float(file.attrs.get("replaces_from", math.inf))
        return file["histogram_edges"][()] if "histogram_edges" in file else None

    def _attempt(self, read: Callable[[], _Result]) -> _Result:
        for pause in (*_PAUSES, None):
            try:
                return read()
            except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
                self.close()
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the system's answer, such as a missing permission, is no damage
                if pause is None:
                    raise ValueError(f"{self.path} is not a readable segment: {error}") from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _opened(self) -> Any:
        if self._file is None:
            self._file = _open(self.path)
        return self._file

    def _dataset(self, name: str) -> Any:
        if name not in self._datasets:  # kept, since HDF5's cache of chunks goes with it
            self._datasets[name] = self._opened()[name]
        return self._datasets[name]

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        self._datasets.clear()
        if self._file is not None:
            self._file.close()
            self._file = None


def _open(path: Path) -> Any:
    view = FileView(os.open(path, os.O_RDONLY))
    try:
        return h5py.File(view, "r", rdcc_nbytes=_CACHE_BYTES, rdcc_nslots=_CACHE_SLOTS)
    except BaseException:
        view.close()
        raise


def _lines(text: Any) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = json.loads(b"[" + b",".join(text.tobytes().splitlines()) + b"]")
    return lines
