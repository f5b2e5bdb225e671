"""One HDF5 file of a run, readable by others while it grows and after its writer was killed.

A file holds these datasets and nothing else, because SWMR mode allows no new ones:

===================  ==================  ==========================================================
``steps``            rows                int64; the commit marker: a row counts once it is here
``commits``          rows x 6            int64, see `COMMIT_FIELDS`; written before ``steps`` grows
``values``           rows x keys         float64, `ABSENT` where a key was not measured
``keys``             bytes               UTF-8 JSON, one line per column of ``values``
``histograms``       rows x keys x bins  float64, `ABSENT` where a key was not measured
``histogram_keys``   bytes               UTF-8 JSON, one line per column of ``histograms``
``histogram_edges``  edges               float64, only where the run has them
``events``           bytes               UTF-8 JSON, one line per event
===================  ==================  ==========================================================

Its attributes are ``format`` and, where a run went back to an earlier step, ``replaces_from``: the
steps from that one on in earlier segments no longer count.

Text is kept as bytes because SWMR mode cannot grow variable-length strings. ``values`` and
``histograms`` may end before the last row; the rows that they lack hold nothing.
"""

from __future__ import annotations

import errno
import json
import os
import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from tmm.layout import StepRecord, Table
from tmm.metrics import FloatArray

FORMAT = 1
ABSENT_BITS = np.uint64(0x7FF8616273656E74)  # a quiet NaN whose payload says "absent" in ASCII
ABSENT = ABSENT_BITS.view(np.float64)
COMMIT_FIELDS = (
    "step",
    "measured",
    "file_bytes",
    "key_bytes",
    "histogram_key_bytes",
    "event_bytes",
)

_CHUNK_ROWS = 32
_CHUNK_VALUES = 8192  # 64 KiB: larger chunks waste space in short runs, smaller ones cost writes
_CHUNK_BYTES = 8192  # of the datasets that hold text
_KNOWN_LAYOUTS = 64
_FILE_FORMAT = ("v110", "v110")  # the first with SWMR, so that every later HDF5 reads it
_NAME = re.compile(r"metrics-(\d{3,})\.h5")


def segment_paths(folder: Path) -> list[Path]:
    """Return the segments in ``folder``, oldest first; files still being created are left out."""
    numbered = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in numbered if match)]


def is_measured(values: FloatArray) -> npt.NDArray[np.bool_]:
    """Tell which of ``values``, shape (n,) or (n, bins), were measured, as shape (n,)."""
    measured = values.view(np.uint64) != ABSENT_BITS
    whole: npt.NDArray[np.bool_] = measured.all(axis=tuple(range(1, values.ndim)))
    return whole


class SegmentWriter:
    """Creates the next segment of ``folder`` and appends steps to it.

    ``keys`` and ``bins`` are the numbers to expect: they choose the chunks and limit nothing. The
    file gets its final name, ``path``, once it is ready for readers. With ``replaces_from``, steps
    from that one on in earlier segments no longer count from then on. Raises OSError.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keys: int,
        bins: int = 64,
        histogram_edges: FloatArray | None = None,
        replaces_from: int | None = None,
    ) -> None:
        try:
            temporary, self.path = _claim(folder)
        except OSError as error:
            raise _storage_error(f"cannot create a segment in {folder}", error) from error
        self._descriptor = -1
        try:
            # Without a chunk cache HDF5 writes what changed in a chunk, and not the whole of it.
            self._file = h5py.File(
                temporary, "w", libver=_FILE_FORMAT, locking=False, rdcc_nbytes=0
            )
            self._descriptor = self._file.id.get_vfd_handle()
            self._inode = _inode(self._descriptor)
            if hasattr(os, "register_at_fork"):
                os.register_at_fork(after_in_child=partial(_abandon, weakref.ref(self)))
            _create_datasets(self._file, keys, bins, histogram_edges)
            if replaces_from is not None:
                self._file.attrs["replaces_from"] = replaces_from
            self._file.swmr_mode = True
            self._file.flush()
            temporary.rename(self.path)
        except Exception as error:  # HDF5 reports a failing disk under many classes
            self.abandon()
            with suppress(OSError):  # the first error says why
                temporary.unlink()
            raise _storage_error(f"cannot create {self.path}", error) from error
        self._steps, self._commits = self._file["steps"], self._file["commits"]
        self._scalars = _Matrix(self._file["values"], self._file["keys"])
        self._histograms = _Matrix(self._file["histograms"], self._file["histogram_keys"])
        self._events = self._file["events"]

    def write(self, record: StepRecord) -> None:
        """Append ``record`` and flush it; from then on it outlives this process.

        A record without tables adds its events only: it is no step and replaces none. Raises
        ValueError for a record that makes no sense, of which nothing is kept, and OSError, naming
        the file and the step, where it cannot be stored; the segment then takes no more.
        """
        if self._descriptor < 0:
            raise OSError(errno.EBADF, f"cannot write step {record.step}: {self.path} is closed")
        if not -(2**63) <= record.step < 2**63:
            raise ValueError(f"step {record.step} does not fit in 64 bits")
        scalars, histograms = _stack(record.scalars, 1), _stack(record.histograms, 2)
        bins = self._histograms.values.shape[2]
        if len(histograms) and bins not in (0, histograms.shape[1]):
            raise ValueError(f"histograms of {histograms.shape[1]} bins in a segment of {bins}")
        self._check_keys(record)
        try:
            self._append(record, scalars, histograms)
        except Exception as error:  # as above
            self.abandon()
            message = f"cannot write step {record.step} to {self.path}"
            raise _storage_error(message, error) from error

    def _check_keys(self, record: StepRecord) -> None:
        if self._scalars.knows(record.scalars) and self._histograms.knows(record.histograms):
            return
        seen: set[str] = set()
        for tables, other in (
            (record.scalars, self._histograms),
            (record.histograms, self._scalars),
        ):
            for key in _keys(tables):
                if key in seen:
                    raise ValueError(f"step {record.step} holds the key {key!r} twice")
                if key in other.columns:
                    raise ValueError(f"{key!r} was a number and is now a histogram, or vice versa")
                seen.add(key)

    def _append(self, record: StepRecord, scalars: FloatArray, histograms: FloatArray) -> None:
        row = len(self._steps)
        self._scalars.write(row, record.scalars, scalars)
        self._histograms.write(row, record.histograms, histograms)
        _append_lines(self._events, map(vars, record.events))
        self._file.flush()  # first, so that no reader sees a commit of something not yet there
        measured = bool(record.scalars or record.histograms)
        texts = (self._scalars.keys, self._histograms.keys, self._events)
        self._commits.resize(row + 1, axis=0)
        self._commits[row] = (
            record.step,
            measured,
            self._file.id.get_filesize(),
            *(len(text) for text in texts),
        )
        self._file.flush()
        self._steps.resize(row + 1, axis=0)
        self._steps[row] = record.step
        self._file.flush()

    def close(self) -> None:
        """Flush and close the file, once; raises OSError."""
        if self._descriptor < 0:
            return
        try:
            self._file.flush()
            self._file.close()
            self._descriptor = -1
        except Exception as error:  # as above
            self.abandon()
            raise _storage_error(f"cannot close {self.path}", error) from error

    def abandon(self) -> None:
        """Let go of the file as it is on disk, without another write to it.

        HDF5 keeps what it could not write and tries again at close and at the exit of the
        interpreter, where it crashes; a forked child would write to its parent's file. So what it
        still wants to write goes to the null device.
        """
        if self._descriptor < 0:
            return
        with suppress(OSError):  # best effort, after an error that was reported
            if _inode(self._descriptor) == self._inode:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, self._descriptor, inheritable=False)
                os.close(null)
        self._descriptor = -1
        with suppress(Exception):  # likewise; the file on disk is out of reach by now
            self._file.close()


class _Matrix:
    """Steps x keys (x bins): the values and, as text, what their columns mean."""

    def __init__(self, values: Any, keys: Any) -> None:
        self.values, self.keys = values, keys
        self.columns: dict[str, int] = {}
        self._layouts: dict[tuple[int, ...], tuple[Any, npt.NDArray[np.intp]]] = {}

    def knows(self, tables: tuple[Table, ...]) -> bool:
        return not tables or tuple(id(table.infos) for table in tables) in self._layouts

    def write(self, row: int, tables: tuple[Table, ...], values: FloatArray) -> None:
        columns = self._columns_of(tables)
        if not len(columns):
            return
        # Chunks of which nothing was measured are not written: they cost nothing.
        width = self.values.chunks[1]
        start = int(columns.min()) // width * width
        stop = min(len(self.columns), -(-(int(columns.max()) + 1) // width) * width)
        block = np.full((stop - start, *values.shape[1:]), ABSENT)
        block[columns - start] = values
        self.values.resize((row + 1, len(self.columns), *block.shape[1:]))
        self.values[row, start:stop] = block

    def _columns_of(self, tables: tuple[Table, ...]) -> npt.NDArray[np.intp]:
        infos = tuple(table.infos for table in tables)
        layout = tuple(map(id, infos))
        if layout not in self._layouts:
            new = [info for info in chain(*infos) if info.key not in self.columns]
            _append_lines(self.keys, map(vars, new))
            for info in new:
                self.columns[info.key] = len(self.columns)
            if len(self._layouts) == _KNOWN_LAYOUTS:
                self._layouts.clear()
            columns = np.array([self.columns[info.key] for info in chain(*infos)], dtype=np.intp)
            self._layouts[layout] = infos, columns  # the infos too, so that the ids stay theirs
        return self._layouts[layout][1]


def _claim(folder: Path) -> tuple[Path, Path]:
    """Return a new empty file under a temporary name, and the final name that it alone may take."""
    taken = [path.stem.partition("-")[2] for path in segment_paths(folder)]
    number = max(map(int, taken), default=0)
    while True:
        number += 1
        final = folder / f"metrics-{number:03d}.h5"
        temporary = folder / f".{final.name}.partial"
        try:
            temporary.open("xb").close()
        except FileExistsError:  # another process is at this number, or died there
            continue
        if not final.exists():
            return temporary, final
        temporary.unlink()


def _create_datasets(file: Any, keys: int, bins: int, edges: FloatArray | None) -> None:
    def create(name: str, dtype: str, chunks: tuple[int, ...], fixed: tuple[int, ...] = ()) -> None:
        free = len(chunks) - len(fixed)
        file.create_dataset(
            name,
            shape=(0,) * free + fixed,
            maxshape=(None,) * free + fixed,
            chunks=chunks,
            dtype=dtype,
            fillvalue=ABSENT if dtype == "<f8" else None,
        )

    width = min(_CHUNK_VALUES // _CHUNK_ROWS, max(64, keys))
    histograms = max(1, _CHUNK_VALUES // _CHUNK_ROWS // bins)
    create("steps", "<i8", (512,))
    create("commits", "<i8", (128, len(COMMIT_FIELDS)), (len(COMMIT_FIELDS),))
    create("values", "<f8", (_CHUNK_ROWS, width))
    create("histograms", "<f8", (_CHUNK_ROWS, histograms, bins))
    for name in ("keys", "histogram_keys", "events"):
        create(name, "u1", (_CHUNK_BYTES,))
    if edges is not None:
        file["histogram_edges"] = np.asarray(edges, dtype="<f8")
    # Bytes, because h5py converts no str any more while the interpreter exits.
    file["commits"].attrs["fields"] = np.bytes_(" ".join(COMMIT_FIELDS))
    file.attrs["format"] = FORMAT


def _stack(tables: tuple[Table, ...], dimensions: int) -> FloatArray:
    """Join the values of ``tables`` to one array, with one bit pattern for NaN."""
    if not tables:
        return np.empty((0,) * dimensions)
    for table in tables:
        if table.values.ndim != dimensions or len(table.values) != len(table.infos):
            found, keys = table.values.shape, len(table.infos)
            raise ValueError(f"values of shape {found} for {keys} keys in {dimensions} dimensions")
    values = np.concatenate([table.values for table in tables], dtype=np.float64)
    if 0 in values.shape[1:]:
        raise ValueError("histograms without bins")
    values[np.isnan(values)] = np.nan
    return values


def _keys(tables: tuple[Table, ...]) -> Iterator[str]:
    return (info.key for table in tables for info in table.infos)


def _append_lines(dataset: Any, lines: Iterable[dict[str, Any]]) -> None:
    # A key may be any str. JSON escapes would join two lone surrogates to one character.
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    if len(data):
        length = len(dataset)
        dataset.resize(length + len(data), axis=0)
        dataset[length:] = data


def _inode(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _abandon(writer: weakref.ref[SegmentWriter]) -> None:
    if (alive := writer()) is not None:
        alive.abandon()


def _storage_error(message: str, error: Exception) -> OSError:
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"errno = (\d+)", str(error))):
        number = int(match[1])
    reason = str(error) if number is None else os.strerror(number)
    return OSError(number or errno.EIO, f"{message}: {reason}")
