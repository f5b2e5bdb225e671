"""Datasets of an HDF5 file that grow: by rows, and by rows x keys, each value in its column."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from h5py import h5s

from tmm.core.metrics import FloatArray
from tmm.core.records import KeyInfo, Table
from tmm.runtime.store.segment_layout import ABSENT

_KNOWN_LAYOUTS = 64
_Indices: TypeAlias = npt.NDArray[np.intp]


class GrowingDataset:
    """Appends to an empty dataset, which nobody else writes to.

    By calls of h5py's low level: those of its high level take several times as long, as they look
    at types and selections anew each time.
    """

    def __init__(self, dataset: Any) -> None:
        self._identifier = dataset.id
        self.length = 0

    def append(self, block: npt.NDArray[Any], column: int = 0, columns: int | None = None) -> None:
        """Add ``block``, shape (rows, ...), of the dataset's dtype.

        It begins at ``column`` of the second dimension, of which there are ``columns`` from then
        on; what it does not fill stays empty.
        """
        shape = [self.length + len(block), *block.shape[1:]]
        start = [self.length, *[0] * (block.ndim - 1)]
        if columns is not None:
            shape[1], start[1] = columns, column
        self._identifier.set_extent(tuple(shape))
        space = self._identifier.get_space()
        space.select_hyperslab(tuple(start), block.shape)
        self._identifier.write(h5s.create_simple(block.shape), space, block)
        self.length += len(block)


class Matrix:
    """A dataset of rows x keys (x bins) and, as text, what its columns mean."""

    def __init__(self, values: Any, keys: Any) -> None:
        self.values, self.keys = GrowingDataset(values), GrowingDataset(keys)
        self.bins = 0  # of a histogram, once there is one
        self.columns: dict[str, int] = {}
        self._chunk_width: int = values.chunks[1]

    def columns_of(self, infos: Sequence[KeyInfo]) -> _Indices:
        """The columns of keys, new ones for those that have none."""
        new = [info for info in infos if info.key not in self.columns]
        append_lines(self.keys, map(vars, new))
        for info in new:
            self.columns[info.key] = len(self.columns)
        return np.array([self.columns[info.key] for info in infos], dtype=np.intp)

    def whole_chunks(self, columns: _Indices) -> slice:
        """The columns of the chunks that these lie in: others are not written, and cost nothing."""
        width, last = self._chunk_width, int(columns.max())
        stop = min(len(self.columns), -(-(last + 1) // width) * width)
        return slice(int(columns.min()) // width * width, stop)

    def append(self, row: FloatArray, start: int) -> None:
        """Add a row, shape (1, some columns) or (1, some columns, bins), from a column on."""
        self.bins = row.shape[2] if row.ndim > 2 else 0
        self.values.append(row, start, len(self.columns))


@dataclass(frozen=True, eq=False)
class _Share:
    """What a matrix gets of the values of a step: those at ``places``, for its ``columns``."""

    matrix: Matrix
    places: _Indices
    columns: _Indices

    @cached_property
    def _written(self) -> slice:
        return self.matrix.whole_chunks(self.columns)

    def append(self, values: FloatArray) -> None:
        written = self._written
        row = np.full((1, written.stop - written.start, *values.shape[1:]), ABSENT)
        row[0, self.columns - written.start] = values[self.places]
        self.matrix.append(row, written.start)


class Matrices:
    """Where the values of tables go: to ``narrow`` if they first came in a table of few keys."""

    def __init__(self, wide: Matrix, narrow: Matrix | None = None, few: int = 0) -> None:
        self._wide, self._narrow, self._few = wide, narrow or wide, few
        self._layouts: dict[tuple[int, ...], tuple[Any, list[_Share]]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._wide.columns or key in self._narrow.columns

    def knows(self, tables: tuple[Table, ...]) -> bool:
        """Whether a step with these tables, or none, was written before."""
        return not tables or tuple(id(table.infos) for table in tables) in self._layouts

    def append(self, tables: tuple[Table, ...], values: FloatArray) -> None:
        """Add the values of the tables, which are joined, to matrices that have any of them."""
        for share in self._shares(tables):
            share.append(values)

    def _shares(self, tables: tuple[Table, ...]) -> list[_Share]:
        infos = tuple(table.infos for table in tables)
        layout = tuple(map(id, infos))
        if layout not in self._layouts:
            members: dict[Matrix, list[tuple[int, KeyInfo]]] = {}
            of_all = [(info, self._matrix(info.key, len(some))) for some in infos for info in some]
            for place, (info, matrix) in enumerate(of_all):
                members.setdefault(matrix, []).append((place, info))
            found = []
            for matrix, some in members.items():
                columns = matrix.columns_of([info for _, info in some])
                places = np.array([place for place, _ in some], dtype=np.intp)
                found.append(_Share(matrix, places, columns))
            if len(self._layouts) == _KNOWN_LAYOUTS:
                self._layouts.clear()
            self._layouts[layout] = infos, found  # the infos too, so that the ids stay theirs
        return self._layouts[layout][1]

    def _matrix(self, key: str, size: int) -> Matrix:
        for matrix in (self._wide, self._narrow):
            if key in matrix.columns:
                return matrix
        return self._narrow if size <= self._few else self._wide


def stack(tables: tuple[Table, ...], dimensions: int) -> FloatArray:
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


def append_lines(dataset: GrowingDataset, lines: Iterable[dict[str, Any]]) -> None:
    """Add lines of JSON to a dataset of bytes."""
    # A key may be any str. JSON escapes would join two lone surrogates to one character.
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    data = np.frombuffer(text.encode("utf-8", "surrogatepass"), dtype=np.uint8)
    if len(data):
        dataset.append(data)
