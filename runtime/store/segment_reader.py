"""Reads one segment of a run: what its writer has committed, while it grows or afterwards.

A file is opened anew when there is more in it. The order in which a SWMR writer writes keeps every
such view consistent; a read in the very moment of a write may fail, and is done again.
"""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from tmm.core.metrics import FloatArray
from tmm.core.records import Event, KeyInfo
from tmm.runtime.store.segment_file import Mark, SegmentFile
from tmm.runtime.store.segment_layout import ABSENT, COMMIT_FIELDS, FORMAT, MATRICES, is_measured
from tmm.runtime.store.untrusted import parse_json

_PAUSES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # seconds between attempts
_CLOCK_SECONDS = 2.0  # more than the resolution of a file's time of change
_VALUE_BYTES = 8
_BLOCK_VALUES = 1 << 21  # read at once from many series
_DAMAGE = (ValueError, LookupError, TypeError, ArithmeticError, struct.error)
_TEXTS = (*MATRICES.values(), "events")

_Result = TypeVar("_Result")
_Line = TypeVar("_Line", KeyInfo, Event)
_Rows: TypeAlias = npt.NDArray[np.intp]
_Commits: TypeAlias = npt.NDArray[np.int64]


class SegmentReader:
    """What is committed in a segment, as of the last `refresh`.

    ``steps`` and ``measured`` have one element per row; ``infos`` and ``histogram_infos`` map keys
    in the order of their columns; steps of earlier segments count below ``replaces_from`` only.
    Raises ValueError, naming the file, where it is damaged, and OSError where it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps = np.empty(0, dtype=np.int64)
        self.measured = np.empty(0, dtype=np.bool_)
        self.infos: dict[str, KeyInfo] = {}
        self.histogram_infos: dict[str, KeyInfo] = {}
        self.events: list[Event] = []
        self.replaces_from = math.inf
        self.histogram_edges: FloatArray | None = None
        self._places: dict[str, tuple[str, int]] = {}  # of a key: its dataset and column
        self._widths = dict.fromkeys(MATRICES, 0)  # columns of the datasets
        self._rows = {name: np.empty(0, dtype=np.intp) for name in MATRICES}  # which step each is
        self._texts = dict.fromkeys(_TEXTS, 0)  # bytes read so far
        self._file: SegmentFile | None = None
        self._seen: tuple[int, int] | None = None
        self._mark: Mark | None = None  # of ``steps``, once the format and edges are known
        self.refresh()

    def refresh(self) -> bool:
        """Take in what was committed since the last time; tell whether there was anything."""
        seen = self._stamp()
        if seen == self._seen:
            return False
        grown = self._attempt(self._take_in)
        # What changed just now may change again without another time of change.
        self._seen = None if _is_recent(seen) else seen
        return grown

    def _take_in(self) -> bool:
        if self._mark is not None and self._mark.is_still_in(self.path):
            return False
        file = SegmentFile(self.path)
        try:
            if self._mark is None and (found := file.attribute("format")) != FORMAT:
                raise ValueError(f"its format is {found}, not {FORMAT}")
            mark = file.mark("steps")  # first: what comes meanwhile is seen the next time
            if self._mark is None:
                self._begin(file)
            (count,) = file.shape("steps")
            grown = count > len(self.steps)
            if grown:
                self._take_rows(file, count)
                self.close()
                self._file = file
            self._mark = mark
            return grown
        finally:
            if file is not self._file:
                file.close()

    def _begin(self, file: SegmentFile) -> None:
        file.check()
        replaces_from = file.attribute("replaces_from")
        self.replaces_from = math.inf if replaces_from is None else float(replaces_from)
        if "histogram_edges" in file:
            (edges,) = file.shape("histogram_edges")
            self.histogram_edges = file.read("histogram_edges", slice(0, edges))

    def _take_rows(self, file: SegmentFile, count: int) -> None:
        known = len(self.steps)
        # Of ``steps`` only the length is needed, as ``commits`` has the numbers too.
        commits = file.read("commits", slice(known, count), slice(0, len(COMMIT_FIELDS)))
        last = dict(zip(COMMIT_FIELDS, commits[-1].tolist(), strict=True))
        size = os.stat(self.path).st_size
        if not 0 < last["file_bytes"] <= size:
            raise ValueError(f"it was cut off at {size} bytes")
        ends = dict(zip(_TEXTS, commits[-1, 3:-3].tolist(), strict=True))
        *keys, events = (
            _lines(file, name, start, ends[name]) for name, start in self._texts.items()
        )
        rows = {
            name: np.concatenate(
                [self._rows[name], known + _new_rows(len(self._rows[name]), counts)]
            )
            for name, counts in zip(MATRICES, commits[:, -3:].T, strict=True)
        }
        found = [[_checked(KeyInfo, line) for line in lines] for lines in keys]
        new_events = [_checked(Event, line) for line in events]
        self._take_keys(dict(zip(MATRICES, found, strict=True)))
        # Nothing fails from here on: an attempt that does leaves nothing behind.
        self._rows, self._texts = rows, ends
        self.events.extend(new_events)
        self.steps = np.concatenate([self.steps, commits[:, 0]])
        self.measured = np.concatenate([self.measured, commits[:, 1] != 0])

    def _take_keys(self, found: dict[str, list[KeyInfo]]) -> None:
        new = [info.key for infos in found.values() for info in infos]
        if len(self._places.keys() | set(new)) < len(self._places) + len(new):
            raise ValueError("it has two columns of one key")
        for name, infos in found.items():
            known = self.histogram_infos if name == "histograms" else self.infos
            for info in infos:
                self._places[info.key] = name, self._widths[name]
                self._widths[name] += 1
                known[info.key] = info

    def has(self, key: str) -> bool:
        """Whether there is a column of that key."""
        return key in self._places

    def series(self, key: str) -> tuple[_Rows, FloatArray]:
        """Return the rows that may have values of ``key``, shape (n,), and the values.

        These have shape (n,), or (n, bins) for a histogram; `ABSENT` where not measured.
        """
        name, column = self._places[key]
        rows = self._rows[name]
        return rows, self._attempt(lambda: self._matrix(name).column(name, len(rows), column))

    def table(self, keys: Sequence[str]) -> FloatArray:
        """Return the numbers of ``keys``, shape (keys, rows); `ABSENT` where not measured.

        Each chunk of the file is read once. Keys that the segment lacks are not measured.
        """

        def read() -> FloatArray:
            result = np.full((len(keys), len(self.steps)), ABSENT)
            for name in MATRICES:
                own = [n for n, key in enumerate(keys) if self._dataset_of(key) == name]
                if not own:
                    continue
                places = np.array(own, dtype=np.intp)
                columns = np.array([self._places[keys[n]][1] for n in own], dtype=np.intp)
                file, rows = self._matrix(name), self._rows[name]
                width = file.chunk(name)[1]
                for start in np.unique(columns // width) * width:
                    here = (columns >= start) & (columns < start + width)
                    there = slice(int(start), min(int(start) + width, self._widths[name]))
                    for some in _blocks(file.chunk(name)[0], len(rows), there):
                        found = file.read(name, some, there)[:, columns[here] - start]
                        result[np.ix_(places[here], rows[some])] = found.T
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
                    some = slice(place, place + 1), slice(0, width)
                    values = self._matrix(name).read(name, *some)[0]
                    plain = values.tolist() if values.ndim == 1 else values
                    rows[name] = plain, is_measured(values).tolist()
            result: dict[str, float | FloatArray] = {}
            for key, (name, column) in self._places.items():
                if name in rows and rows[name][1][column]:
                    result[key] = rows[name][0][column]
            return result

        return self._attempt(read)

    def _matrix(self, name: str) -> SegmentFile:
        """The file, whose dataset of that name has all that was committed of it."""
        if self._file is None:
            self._file = SegmentFile(self.path)
        shape, rows, width = self._file.shape(name), len(self._rows[name]), self._widths[name]
        # Each row, and each column, has the bins of one histogram at least.
        is_in_it = max(rows, width) * math.prod(shape[2:]) * _VALUE_BYTES <= self._file.size
        if shape[0] < rows or (rows and shape[1] < width) or not is_in_it:
            raise ValueError(f"its {name} has the shape {shape}, for {rows} rows of {width}")
        return self._file

    def _attempt(self, read: Callable[[], _Result]) -> _Result:
        for pause in (*_PAUSES, None):
            stamp = self._stamp()
            try:
                return read()
            except _DAMAGE as error:
                self.close()
                # Where nobody writes, the next attempt would find the same.
                is_final = stamp == self._stamp() and not _is_recent(stamp)
                if pause is None or is_final:
                    raise ValueError(f"{self.path} is not a readable segment: {error}") from error
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _stamp(self) -> tuple[int, int]:
        """Size and time of change of the file."""
        status = os.stat(self.path)
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _blocks(chunk: int, rows: int, columns: slice) -> Iterator[slice]:
    """All rows, as many at a time of some columns as take little memory; whole chunks of them."""
    step = max(1, _BLOCK_VALUES // (columns.stop - columns.start) // chunk) * chunk
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _is_recent(stamp: tuple[int, int]) -> bool:
    return time.time() - stamp[1] / 1e9 <= _CLOCK_SECONDS


def _new_rows(known: int, counts: _Commits) -> _Rows:
    """The commits, counted from 0, that brought a row, where ``counts`` is how many there are."""
    brought = np.diff(counts, prepend=known)
    if ((brought != 0) & (brought != 1)).any():
        raise ValueError("its commits do not count its rows")
    return np.flatnonzero(brought)


def _lines(file: SegmentFile, name: str, start: int, end: int) -> list[Any]:
    """The lines of JSON in a part of a text."""
    if start == end:
        return []
    (length,) = file.shape(name)
    if not start < end <= min(length, file.size):
        raise ValueError(f"its {name} end at {end}, of {length} bytes")
    text = file.read(name, slice(start, end)).tobytes()
    lines: list[Any] = parse_json(b"[" + b",".join(text.splitlines()) + b"]")
    return lines


_WHOLE_NUMBERS = ("position", "step")
_TYPES = {
    kind: {field.name: int if field.name in _WHOLE_NUMBERS else str for field in fields(kind)}
    for kind in (KeyInfo, Event)
}


def _checked(kind: type[_Line], line: Any) -> _Line:
    """What a line says; raises ValueError, or KeyError for a field that is not known."""
    types = _TYPES[kind]
    if not isinstance(line, dict) or any(type(line[name]) is not types[name] for name in line):
        raise ValueError(f"one of its lines has other fields or types: {line!r:.200}")
    return kind(**line)
