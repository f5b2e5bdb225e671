"""Reads one segment of a run: what its writer has committed, while it grows or afterwards."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tmm.layout import Event, KeyInfo
from tmm.metrics import FloatArray
from tmm.runtime.segment import ABSENT, COMMIT_FIELDS, FORMAT, inode, is_measured

_CACHE_BYTES = 32 << 20  # the chunks of one series of 16,000 rows, so that its neighbours come free
_CACHE_SLOTS = 10_007  # many times the number of chunks in the cache, and a prime
_READ_ATTEMPTS = 28


class SegmentReader:
    """What is committed in a segment, as of the last `refresh`.

    ``steps`` and ``measured`` have one element per row; ``infos`` and ``histogram_infos`` map keys
    in the order of their columns. Raises ValueError, naming the file, where it is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps = np.empty(0, dtype=np.int64)
        self.measured = np.empty(0, dtype=np.bool_)
        self.infos: dict[str, KeyInfo] = {}
        self.histogram_infos: dict[str, KeyInfo] = {}
        self.histogram_edges: FloatArray | None = None
        self.events: list[Event] = []
        self._columns: dict[str, int] = {}
        self._texts = {"keys": 0, "histogram_keys": 0, "events": 0}  # bytes read so far
        with _damage_named(self.path):
            self._open()
            if "histogram_edges" in self._file:
                self.histogram_edges = self._file["histogram_edges"][()]
        self.refresh()

    def _open(self) -> None:
        self._file = h5py.File(_open_file(self.path))
        self._inode = inode(self.path)
        if self._file.attrs["format"] != FORMAT:
            raise ValueError(f"its format is {self._file.attrs['format']}, not {FORMAT}")
        names = ("steps", "commits", "values", "histograms", *self._texts)
        self._datasets = {name: self._file[name] for name in names}

    def refresh(self) -> bool:
        """Take in what was committed since the last time; tell whether there was anything."""
        known = len(self.steps)
        with _damage_named(self.path):
            self._follow()
            self._datasets["steps"].refresh()
            rows = len(self._datasets["steps"])
            if rows == known:
                return False
            for dataset in self._datasets.values():
                dataset.refresh()
            # A reader in the writer's own process may see ``steps`` grown and not yet filled,
            # but no row of ``commits`` that way: the numbers are read from there.
            commits = self._read("commits", np.s_[known:rows])
            last = dict(zip(COMMIT_FIELDS, commits[-1].tolist(), strict=True))
            size = os.fstat(self._file.id.get_vfd_handle()).st_size
            if not 0 < last["file_bytes"] <= size:
                raise ValueError(f"it was cut off at {size} bytes")
            keys, histogram_keys, events = (
                self._new_lines(name, last[field])
                for name, field in zip(self._texts, COMMIT_FIELDS[-3:], strict=True)
            )
            for fields, infos in ((keys, self.infos), (histogram_keys, self.histogram_infos)):
                for info in fields:
                    self._columns[info["key"]] = len(infos)
                    infos[info["key"]] = KeyInfo(**info)
            self.events.extend(Event(**event) for event in events)
        self._texts = dict(zip(self._texts, commits[-1, -3:].tolist(), strict=True))
        self.steps = np.concatenate([self.steps, commits[:, 0]])
        self.measured = np.concatenate([self.measured, commits[:, 1] != 0])
        return True

    def _new_lines(self, name: str, end: int) -> list[dict[str, Any]]:
        text: bytes = self._read(name, np.s_[self._texts[name] : end]).tobytes()
        lines: list[dict[str, Any]] = json.loads(b"[" + b",".join(text.splitlines()) + b"]")
        return lines

    def series(self, key: str) -> FloatArray:
        """Return shape (rows,), or (rows, bins) for a histogram; `ABSENT` where not measured."""
        name = "values" if key in self.infos else "histograms"
        with _damage_named(self.path):
            shape = self._datasets[name].shape
            rows = min(len(self.steps), shape[0])
            result = np.full((len(self.steps), *shape[2:]), ABSENT)
            result[:rows] = self._read(name, np.s_[:rows, self._columns[key]])
        return result

    def row(self, index: int) -> dict[str, float | FloatArray]:
        """Return what was measured in a row: a number or an array of shape (bins,) by key."""
        result: dict[str, float | FloatArray] = {}
        for name, infos in (("values", self.infos), ("histograms", self.histogram_infos)):
            with _damage_named(self.path):
                if index < len(self._datasets[name]):
                    values = self._read(name, np.s_[index, : len(infos)])
                    plain = values.tolist() if values.ndim == 1 else values
                    columns = zip(infos, plain, is_measured(values), strict=True)
                    result |= {key: value for key, value, measured in columns if measured}
        return result

    def _read(self, name: str, selection: Any) -> Any:
        values = self._datasets[name][selection]
        if self._follow():
            values = self._datasets[name][selection]
        return values

    def _follow(self) -> bool:
        """Open the file anew where a writer in this process has abandoned it; tell whether so.

        HDF5 shares one descriptor among all who have a file open in a process, and that of an
        abandoned file leads to the null device, which would be read as zeros.
        """
        if inode(self._file.id.get_vfd_handle()) == self._inode:
            return False
        self._file.close()
        self._open()
        return True

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _open_file(path: Path) -> Any:
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_cache(0, _CACHE_SLOTS, _CACHE_BYTES, 0.75)
    access.set_file_locking(False, True)
    _limit_attempts(access)
    flags = h5py.h5f.ACC_RDONLY | h5py.h5f.ACC_SWMR_READ
    return h5py.h5f.open(os.fsencode(path), flags, fapl=access)


def _limit_attempts(access: Any) -> None:
    """Let a damaged file fail after a quarter of a second.

    Where a checksum is wrong, as it may be for a moment while a writer is at work, HDF5 reads again
    after 1, 2, 4, ... ns, and that 100 times by default: for ever. h5py does not offer the setting;
    without the function or the lock that guards it, a damaged file hangs.
    """
    with suppress(AttributeError, OSError):
        set_attempts = ctypes.PyDLL(h5py.h5p.__file__).H5Pset_metadata_read_attempts
        set_attempts.argtypes = [ctypes.c_int64, ctypes.c_uint]
        with h5py._objects.phil:
            set_attempts(access.id, _READ_ATTEMPTS)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's answer, such as a missing permission, says nothing of the file
        raise ValueError(f"{path} is not a readable segment: {error}") from error
