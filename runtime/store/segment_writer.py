"""Writes one HDF5 file of a run; `segment_layout` tells what is in it."""

from __future__ import annotations

import errno
import os
import re
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5f

from tmm.core.metrics import FloatArray
from tmm.core.records import StepRecord, Table
from tmm.runtime.store.columns import GrowingDataset, Matrices, Matrix, append_lines, stack
from tmm.runtime.store.segment_layout import (
    ABSENT,
    COMMIT_FIELDS,
    FORMAT,
    MATRICES,
    numbers_of,
    segment_name,
    segment_paths,
)

_CHUNK_ROWS = 32
_CHUNK_VALUES = 8192  # 64 KiB: larger chunks waste space in short runs, smaller ones cost writes
_CHUNK_BYTES = 8192  # of the datasets that hold text
_FEW = 16  # keys of a table that is small
_FEW_CHUNK = (64, 8)
_FILE_FORMAT = ("v110", "v110")  # the first with SWMR, so that every later HDF5 reads it


class SegmentWriter:
    """Creates the next segment of ``folder`` and appends steps to it.

    ``keys`` and ``bins`` are the numbers to expect: they choose the chunks and limit nothing. The
    file gets its final name, ``path``, once it is ready for readers. With ``replaces_from``, steps
    from that one on in earlier segments no longer count from then on. ``rank`` is the one that
    records, where several record into one run. Raises OSError.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keys: int,
        bins: int = 64,
        histogram_edges: FloatArray | None = None,
        replaces_from: int | None = None,
        rank: int | None = None,
    ) -> None:
        try:
            temporary, self.path = _claim(folder, rank)
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
            self._links = os.fstat(self._descriptor).st_nlink  # some file systems count none
            self._size = 0  # when the last step was written
        except Exception as error:  # HDF5 reports a failing disk under many classes
            self.abandon()
            with suppress(OSError):  # the first error says why
                temporary.unlink()
            raise _storage_error(f"cannot create {self.path}", error) from error
        self._steps = GrowingDataset(self._file["steps"])
        self._commits = GrowingDataset(self._file["commits"])
        self._matrices = [
            Matrix(self._file[values], self._file[keys]) for values, keys in MATRICES.items()
        ]
        wide, few, histograms = self._matrices
        self._scalars, self._histograms = Matrices(wide, few, _FEW), Matrices(histograms)
        self._events = GrowingDataset(self._file["events"])
        self._texts = [*(matrix.keys for matrix in self._matrices), self._events]

    def write(self, record: StepRecord) -> None:
        """Append ``record`` and flush it; from then on it outlives this process.

        A record without tables adds its events only: it is no step and replaces none. Raises
        ValueError for a record that makes no sense, of which nothing is kept, and OSError, naming
        the file and the step, where it cannot be stored; the segment then takes no more.
        """
        if self._descriptor < 0:
            raise OSError(errno.EBADF, f"cannot write step {record.step}: {self.path} is closed")
        if (what := self._what_happened()) is not None:
            self.abandon()
            raise OSError(
                errno.ENOENT,
                f"cannot write step {record.step}: {self.path} was {what} while it was recorded",
            )
        if not -(2**63) <= record.step < 2**63:
            raise ValueError(f"step {record.step} does not fit in 64 bits")
        scalars, histograms = stack(record.scalars, 1), stack(record.histograms, 2)
        bins = self._matrices[-1].bins
        if len(histograms) and bins not in (0, histograms.shape[1]):
            raise ValueError(f"histograms of {histograms.shape[1]} bins in a segment of {bins}")
        self._check_keys(record)
        try:
            self._append(record, scalars, histograms)
            self._size = os.fstat(self._descriptor).st_size
        except Exception as error:  # as above
            self.abandon()
            message = f"cannot write step {record.step} to {self.path}"
            raise _storage_error(message, error) from error

    def _what_happened(self) -> str | None:
        """What somebody did to the file, so that what is written to it is lost; None if nothing."""
        status = os.fstat(self._descriptor)
        is_linked = status.st_nlink > 0 or status.st_nlink == self._links
        if not (is_linked and os.path.exists(self.path)):
            return "deleted or moved"
        return "cut off" if status.st_size < self._size else None

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
                if key in other:
                    raise ValueError(f"{key!r} was a number and is now a histogram, or vice versa")
                seen.add(key)

    def _append(self, record: StepRecord, scalars: FloatArray, histograms: FloatArray) -> None:
        self._scalars.append(record.scalars, scalars)
        self._histograms.append(record.histograms, histograms)
        append_lines(self._events, map(vars, record.events))
        self._flush()  # first, so that no reader sees a commit of something not yet there
        commit = (
            record.step,
            bool(record.scalars or record.histograms),
            self._file.id.get_filesize(),
            *(text.length for text in self._texts),
            *(matrix.values.length for matrix in self._matrices),
        )
        self._commits.append(np.array([commit], dtype=np.int64))
        self._flush()
        self._steps.append(np.array([record.step], dtype=np.int64))
        self._flush()

    def _flush(self) -> None:
        h5f.flush(self._file.id)

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


def _claim(folder: Path, rank: int | None) -> tuple[Path, Path]:
    """Return a new empty file under a temporary name, and the final name that it alone may take."""
    taken = (number for number, of in map(numbers_of, segment_paths(folder)) if of == rank)
    number = max(taken, default=0)
    while True:
        number += 1
        final = folder / segment_name(number, rank)
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
    create("few_values", "<f8", _FEW_CHUNK)
    create("histograms", "<f8", (_CHUNK_ROWS, histograms, bins))
    for name in (*MATRICES.values(), "events"):
        create(name, "u1", (_CHUNK_BYTES,))
    if edges is not None:
        file["histogram_edges"] = np.asarray(edges, dtype="<f8")
    # Bytes, because h5py converts no str any more while the interpreter exits.
    file["commits"].attrs["fields"] = np.bytes_(" ".join(COMMIT_FIELDS))
    file.attrs["format"] = FORMAT


def _keys(tables: tuple[Table, ...]) -> Iterator[str]:
    return (key for table in tables for key in table.keys)


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
