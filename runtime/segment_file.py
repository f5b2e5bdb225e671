"""A segment as a reader sees it: each of its parts is looked at before anything of it is read.

HDF5 does what a file says: it opens other files, also ones that lie elsewhere, takes as much memory
as a shape or a compressed block asks for, and follows pointers. No writer of segments makes use of
that, so that a file which does is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
from h5py import h5a, h5d, h5l, h5t

from tmm.runtime.file_view import FileView
from tmm.runtime.object_header import read_header
from tmm.runtime.segment import COMMIT_FIELDS, MATRICES
from tmm.runtime.untrusted import open_file

_CACHE_BYTES = 32 << 20  # the chunks of one series of 16,000 rows, so that its neighbours come free
_CACHE_SLOTS = 10_007  # many times the number of chunks in the cache, and a prime
_MOST_CHUNK = 16 << 20  # bytes, in a file that is smaller than that

# As the header of a dataset has them: class, bits, size, offset, precision; of floats more.
_INTEGER = bytes.fromhex("00 080000 08000000 0000 4000")
_BYTE = bytes.fromhex("00 000000 01000000 0000 0800")
_FLOAT = bytes.fromhex("01 203f00 08000000 0000 4000 34 0b 00 34 ff030000")


@dataclass(frozen=True)
class _Form:
    """What a dataset has to be; ``width`` is its last dimension, where that is always the same."""

    type: bytes
    dimensions: int
    width: int | None = None
    has_chunks: bool = True
    is_whole: bool = False  # all of its elements are in the file, which so is no smaller

    @property
    def element_bytes(self) -> int:
        return int.from_bytes(self.type[4:8], "little")


_FORMS = {
    "steps": _Form(_INTEGER, 1, is_whole=True),
    "commits": _Form(_INTEGER, 2, len(COMMIT_FIELDS), is_whole=True),
    "values": _Form(_FLOAT, 2),
    "few_values": _Form(_FLOAT, 2),
    "histograms": _Form(_FLOAT, 3),
    # Longer than the file where a writer was killed before it came to write a text.
    **dict.fromkeys((*MATRICES.values(), "events"), _Form(_BYTE, 1)),
    "histogram_edges": _Form(_FLOAT, 1, has_chunks=False, is_whole=True),
}


class SegmentFile:
    """An open segment. Raises ValueError for what no segment is, and OSError.

    ``size`` is that of the file when it was opened, in bytes.
    """

    def __init__(self, path: Path) -> None:
        self._view = view = FileView(open_file(path))
        try:
            self.size = view.size
            if not view.is_sound:
                raise ValueError("it begins otherwise than an HDF5 file of version 3")
            self._file = h5py.File(view, "r", rdcc_nbytes=_CACHE_BYTES, rdcc_nslots=_CACHE_SLOTS)
        except BaseException:
            view.close()
            raise
        self._datasets: dict[str, Any] = {}
        self._checked: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return bool(self._file.id.links.exists(name.encode()))

    def __getitem__(self, name: str) -> Any:
        """The dataset of that name; kept, since HDF5's cache of chunks goes with it."""
        if name not in self._datasets:
            self._check(name)
            dataset = h5py.Dataset(h5d.open(self._file.id, name.encode()))
            form, shape = _FORMS[name], dataset.shape
            if form.width not in (None, shape[-1]) or (
                form.is_whole and math.prod(shape) * form.element_bytes > self.size
            ):
                raise ValueError(f"its {name} has the shape {shape}")
            self._datasets[name] = dataset
        return self._datasets[name]

    def check(self) -> None:
        """Look at all datasets without opening them; raises ValueError for what no segment has."""
        for name in _FORMS:
            if name != "histogram_edges" or name in self:
                self._check(name)

    def attribute(self, name: str) -> int | None:
        """A whole number that the file has as an attribute; None where it has none."""
        if not h5a.exists(self._file.id, name.encode()):
            return None
        found = h5a.open(self._file.id, name.encode())
        if found.shape != () or found.get_type().get_class() != h5t.INTEGER:
            raise ValueError(f"its {name} is no whole number")
        return int(self._file.attrs[name])

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._datasets.clear()
        self._file.close()

    def _check(self, name: str) -> None:
        if name in self._checked:
            return
        links, form = self._file.id.links, _FORMS[name]
        if not links.exists(name.encode()):
            raise ValueError(f"it has no {name}")
        link = links.get_info(name.encode())
        if link.type != h5l.TYPE_HARD:
            raise ValueError(f"its {name} is a link to elsewhere")
        try:
            header = read_header(self._view.at, link.u)
        except ValueError as error:
            raise ValueError(f"its {name} cannot be read: {error}") from error
        if header.type != form.type or header.dimensions != form.dimensions:
            raise ValueError(f"its {name} has other numbers or dimensions than in a segment")
        if len(header.chunk) != (form.dimensions if form.has_chunks else 0):
            raise ValueError(f"its {name} is not in chunks as in a segment")
        if header.chunk_bytes > max(_MOST_CHUNK, self.size):
            raise ValueError(f"its {name} is in chunks of {header.chunk_bytes:,} bytes")
        self._checked.add(name)
