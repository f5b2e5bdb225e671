"""A segment as a reader sees it: each of its parts is looked at before anything of it is read.

HDF5 does what a file says: it opens others, takes as much memory as a shape or a compressed block
asks for, follows pointers, and crashes on some. It also has one lock for a whole process. So the
few structures that a writer of segments makes are read here without it, and no others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tmm.core.metrics import FloatArray
from tmm.runtime.store.hdf5_bytes import FileBytes
from tmm.runtime.store.hdf5_chunks import Chunks, chunks_of_array, chunks_of_tree
from tmm.runtime.store.hdf5_objects import (
    BYTE,
    FLOAT,
    INTEGER,
    Layout,
    Root,
    read_layout,
    read_root,
)
from tmm.runtime.store.segment_layout import ABSENT, COMMIT_FIELDS, MATRICES

_Array: TypeAlias = npt.NDArray[Any]

_LEAST_CHUNK, _MOST_CHUNK = 512, 16 << 20  # bytes; the latter in a file that is smaller than that
_ROOM = 1 << 20  # bytes that a file may lack of what it has room for, where its writer was killed
_KEPT_BYTES = 32 << 20  # of columns that were read beside those that were asked for
_MARK_BYTES = 256  # of a header; with the shape, which comes first
_ARRAY, _TREE = 4, 5  # kinds of index


@dataclass(frozen=True)
class _Form:
    """What a dataset has to be; ``width`` is its last dimension, where that is always the same."""

    type: bytes
    dimensions: int
    index: int
    width: int | None = None
    is_whole: bool = False  # all of its elements are in the file, which so is no smaller


_FORMS = {
    "steps": _Form(INTEGER, 1, _ARRAY, is_whole=True),
    "commits": _Form(INTEGER, 2, _ARRAY, len(COMMIT_FIELDS), is_whole=True),
    "values": _Form(FLOAT, 2, _TREE),
    "few_values": _Form(FLOAT, 2, _TREE),
    "histograms": _Form(FLOAT, 3, _TREE),
    # Longer than the file where a writer was killed before it came to write a text.
    **dict.fromkeys((*MATRICES.values(), "events"), _Form(BYTE, 1, _ARRAY)),
    "histogram_edges": _Form(FLOAT, 1, 0, is_whole=True),
}
_TYPES: dict[bytes, np.dtype[Any]] = {
    INTEGER: np.dtype("<i8"),
    BYTE: np.dtype("u1"),
    FLOAT: np.dtype("<f8"),
}


@dataclass(frozen=True)
class Mark:
    """What the header of a dataset is, by which one sees whether the dataset has grown."""

    address: int
    header: bytes

    def is_still_in(self, path: Path) -> bool:
        """Whether a file has the same there; raises ValueError and OSError."""
        file = FileBytes(path)
        try:
            return file.at(self.address, len(self.header)) == self.header
        finally:
            file.close()


class SegmentFile:
    """An open segment. Raises ValueError for what no segment is, and OSError.

    ``size`` is that of the file when it was opened, in bytes. It is seen as it was then, or as it
    is when a dataset is first asked for.
    """

    def __init__(self, path: Path) -> None:
        self._bytes = FileBytes(path)
        self.size = self._bytes.size
        self._layouts: dict[str, Layout] = {}
        self._chunks: dict[str, Chunks] = {}
        self._asked: set[str] = set()
        self._kept: dict[tuple[str, int], FloatArray] = {}
        try:
            self._root: Root = read_root(self._bytes)
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._root.objects

    def check(self) -> None:
        """Look at the layouts of all datasets; raises ValueError for what no segment has."""
        for name in _FORMS:
            if name != "histogram_edges" or name in self:
                self._read_layout(name, checked=False)

    def attribute(self, name: str) -> int | None:
        """A whole number that the file has as an attribute; None where it has none."""
        found = self._root.attributes.get(name)
        if found is None and name in self._root.attributes:
            raise ValueError(f"its {name} is no whole number")
        return found

    def mark(self, name: str) -> Mark:
        """What the header of a dataset is now."""
        address = self._root.objects[name]
        return Mark(address, self._bytes.at(address, _MARK_BYTES))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a dataset."""
        return self._layout(name).shape

    def chunk(self, name: str) -> tuple[int, ...]:
        """The shape of the blocks in which a dataset lies in the file."""
        return self._layout(name).chunk

    def read(self, name: str, rows: slice, columns: slice = slice(0, 1)) -> _Array:
        """Return a part of a dataset, which has to lie in it.

        The shape is (rows,), or (rows, columns) and further dimensions as the dataset has them.
        What was never written is `ABSENT`, or zero.
        """
        layout = self._layout(name)
        inner = layout.shape[1:]
        if rows.stop > layout.shape[0] or (inner and columns.stop > inner[0]):
            raise ValueError(f"its {name} has the shape {layout.shape}")
        if inner:
            inner = (columns.stop - columns.start, *inner[1:])
        dtype = _TYPES[layout.type]
        empty = ABSENT if layout.type == FLOAT else 0
        result: _Array = np.full((rows.stop - rows.start, *inner), empty, dtype=dtype)
        if not result.size:
            return result
        if not layout.chunk:
            data = self._bytes.at(layout.address + rows.start * dtype.itemsize, result.nbytes)
            found: _Array = np.frombuffer(data, dtype=dtype).copy()
            return found
        self._fill(result, name, rows, columns)
        return result

    def column(self, name: str, rows: int, column: int) -> FloatArray:
        """Return the first rows of a column, shape (rows,) or (rows, bins).

        Its neighbours in the file come with it, and are kept.
        """
        layout = self._layout(name)
        width = layout.chunk[1]
        first = column // width * width
        columns = slice(first, min(first + width, layout.shape[1]))
        size = rows * (columns.stop - first) * math.prod(layout.shape[2:]) * 8
        if size > _KEPT_BYTES:
            return self.read(name, slice(0, rows), slice(column, column + 1))[:, 0]
        kept = self._kept.get((name, first))
        if kept is None or len(kept) < rows:
            if sum(block.nbytes for block in self._kept.values()) + size > _KEPT_BYTES:
                self._kept.clear()
            kept = self._kept[name, first] = self.read(name, slice(0, rows), columns)
        return kept[:rows, column - first].copy()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._bytes.close()
        self._chunks.clear()
        self._kept.clear()

    def _fill(self, result: _Array, name: str, rows: slice, columns: slice) -> None:
        """Copy what lies in the chunks of a dataset."""
        layout = self._layout(name)
        height, *inner = layout.chunk
        chunks = self._chunks_of(name, rows).within(0, rows.start // height, _last(rows, height))
        if inner:
            width = inner[0]
            chunks = chunks.within(1, columns.start // width, _last(columns, width))
        row_bytes = layout.chunk_bytes // height
        for place, address in zip(chunks.places.tolist(), chunks.addresses.tolist(), strict=True):
            there = [
                slice(number * size, min((number + 1) * size, end))
                for number, size, end in zip(place, layout.chunk, layout.shape, strict=True)
            ]
            wanted = [_common(there[0], rows), *there[1:]]
            if inner:
                wanted[1] = _common(there[1], columns)
            if any(part.start >= part.stop for part in wanted):
                continue
            begin, count = wanted[0].start - there[0].start, wanted[0].stop - wanted[0].start
            data = self._bytes.at(address + begin * row_bytes, count * row_bytes)
            block = np.frombuffer(data, dtype=result.dtype).reshape(count, *inner)
            origins = (rows.start, columns.start, *[0] * len(inner))
            to = tuple(_moved(part, -start) for part, start in zip(wanted, origins, strict=False))
            out_of = tuple(
                _moved(part, -number * size)
                for part, number, size in zip(wanted[1:], place[1:], inner, strict=True)
            )
            result[to] = block[(slice(None), *out_of)]

    def _chunks_of(self, name: str, rows: slice) -> Chunks:
        """The chunks that hold these rows, and maybe others."""
        if name in self._chunks:
            return self._chunks[name]
        layout = self._layout(name)
        # Who asks twice, or for a series, asks again.
        is_kept = layout.index == _TREE and (rows.start == 0 or name in self._asked)
        self._asked.add(name)
        wanted = slice(0, layout.shape[0]) if is_kept else rows
        find = chunks_of_tree if layout.index == _TREE else chunks_of_array
        height, dimensions = layout.chunk[0], len(layout.shape)
        first, last = wanted.start // height, _last(wanted, height)
        found = find(self._bytes, layout.address, dimensions, first, last)
        if len(found.addresses) * layout.chunk_bytes > 2 * self.size + _ROOM:
            raise ValueError(f"its {name} has more chunks than it has room for")
        if is_kept:
            self._chunks[name] = found
        return found

    def _layout(self, name: str) -> Layout:
        if name not in self._layouts:
            self._layouts[name] = self._read_layout(name)
        return self._layouts[name]

    def _read_layout(self, name: str, *, checked: bool = True) -> Layout:
        if name not in self:
            raise ValueError(f"it has no {name}")
        try:
            layout = read_layout(self._bytes, self._root.objects[name], checked=checked)
        except ValueError as error:
            raise ValueError(f"its {name} cannot be read: {error}") from error
        form, shape = _FORMS[name], layout.shape
        if layout.type != form.type or len(shape) != form.dimensions:
            raise ValueError(f"its {name} has other numbers or dimensions than in a segment")
        if form.width not in (None, shape[-1]) or (
            form.is_whole and math.prod(shape) * layout.element_bytes > self.size
        ):
            raise ValueError(f"its {name} has the shape {shape}")
        dimensions = form.dimensions if form.index else 0
        if layout.index != form.index or len(layout.chunk) != dimensions:
            raise ValueError(f"its {name} does not lie in the file as in a segment")
        if form.index and not _LEAST_CHUNK <= layout.chunk_bytes <= max(_MOST_CHUNK, self.size):
            raise ValueError(f"its {name} is in chunks of {layout.chunk_bytes:,} bytes")
        if form.index == _ARRAY and layout.chunk[1:] != shape[1:]:
            raise ValueError(f"its {name} is in chunks of the shape {layout.chunk}")
        return layout


def _last(part: slice, size: int) -> int:
    """The number of the last block of that size in which a part lies."""
    last: int = (part.stop - 1) // size
    return last


def _common(a: slice, b: slice) -> slice:
    return slice(max(a.start, b.start), min(a.stop, b.stop))


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)
