"""Datasets of an HDF5 file that grow along their first dimension."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
from h5py import h5s


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
