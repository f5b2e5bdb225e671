"""Where the chunks of a dataset lie in an HDF5 file (HDF5 File Format Specification 3.0, VII).

A dataset that grows in one dimension has an extensible array of addresses, one that grows in
several a B-tree of them. Both are read from the top: what a writer adds meanwhile comes first at
the bottom.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tmm.runtime.store.hdf5_bytes import NOWHERE, FileBytes, check

Integers: TypeAlias = npt.NDArray[np.int64]
_Nodes: TypeAlias = npt.NDArray[np.int64]

# Of arrays. The numbers are those of HDF5, which no program can choose.
_ARRAY = struct.Struct("<4s8B7Q")
_PARAMETERS = (0, 8, 32, 4, 16, 4, 10)  # kind, bytes of an element, bits of a place, see below
_IN_INDEX, _IN_FIRST_BLOCK, _DIRECT, _BLOCKS_IN_INDEX, _LEVELS, _IN_PAGE = 4, 16, 4, 6, 29, 1024
_PREFIX = 18  # signature, version, kind, address of the header, place of the first element
_PAGE_BYTES = 8 * _IN_PAGE

# Of trees.
_TREE = struct.Struct("<4sBBIHHBBQHQ")
_CHUNK_TREE = 10
_NODE_PREFIX = 6  # signature, version, kind
_MOST_DEPTH = 8


@dataclass(frozen=True, eq=False)
class Chunks:
    """Chunks that are in a file.

    Their places among all chunks have shape (n, dimensions), their addresses shape (n,).
    """

    places: Integers
    addresses: Integers

    def within(self, dimension: int, first: int, last: int) -> Chunks:
        """Those whose place in a dimension is from ``first`` to ``last``."""
        of_dimension = self.places[:, dimension]
        kept = (of_dimension >= first) & (of_dimension <= last)
        return Chunks(self.places[kept], self.addresses[kept])


def chunks_of_array(
    file: FileBytes, address: int, dimensions: int, first: int, last: int
) -> Chunks:
    """The chunks from number ``first`` to ``last`` of an extensible array."""
    found = list(_of_array(file, address, first, last))
    numbers = [np.arange(start, start + len(addresses)) for start, addresses in found]
    places = np.zeros((sum(map(len, numbers)), dimensions), dtype=np.int64)
    places[:, 0] = np.concatenate([np.empty(0, dtype=np.int64), *numbers])
    addresses = np.concatenate([np.empty(0, dtype=np.uint64), *(part for _, part in found)])
    there = (addresses != NOWHERE) & (places[:, 0] >= first) & (places[:, 0] <= last)
    return Chunks(places[there], _signed(addresses[there]))


def _of_array(
    file: FileBytes, address: int, first: int, last: int
) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
    """Runs of addresses, each with the number of its first; some are before ``first``."""
    _, version, *parameters, _, _, _, _, _, _, index = _ARRAY.unpack(
        file.block(address, _ARRAY.size, b"EAHD")
    )
    if version or tuple(parameters) != _PARAMETERS:
        raise ValueError("its array of chunks is of another make")
    if index == NOWHERE:
        return
    in_index = _IN_INDEX + _BLOCKS_IN_INDEX + _LEVELS - _DIRECT
    addresses = _addresses(file.block(index, 14 + 8 * in_index, b"EAIB"), 14)
    yield 0, addresses[:_IN_INDEX]
    start = _IN_INDEX
    for level in range(_LEVELS):
        count, elements = 1 << level // 2, _IN_FIRST_BLOCK << (level + 1) // 2
        end = start + count * elements
        if start > last:
            return
        if end > first:
            # Those of level 0, 1, 2 and 3 are 1, 1, 2 and 2.
            place = _IN_INDEX + (0, 1, 2, 4)[level] if level < _DIRECT else 0
            blocks = (
                _Blocks(addresses[place : place + count])
                if level < _DIRECT
                else _of_level(file, int(addresses[10 + level - _DIRECT]), count, elements)
            )
            for number in range(max(0, (first - start) // elements), count):
                begin = start + number * elements
                if begin > last:
                    return
                yield from blocks.elements(file, number, begin, elements)
        start = end


@dataclass(frozen=True, eq=False)
class _Blocks:
    """The blocks of a level, and which of their pages were written, where they have some."""

    addresses: npt.NDArray[np.uint64]
    pages: npt.NDArray[np.uint8] | None = None

    def elements(
        self, file: FileBytes, number: int, begin: int, elements: int
    ) -> Iterator[tuple[int, npt.NDArray[np.uint64]]]:
        """The addresses in a block, which begins with the element ``begin``."""
        if number >= len(self.addresses) or self.addresses[number] == NOWHERE:
            return
        address = int(self.addresses[number])
        if self.pages is None:
            block = file.block(address, _PREFIX + 8 * elements, b"EADB")
            yield begin, _addresses(block, _PREFIX)
            return
        file.block(address, _PREFIX, b"EADB")
        pages = elements // _IN_PAGE
        for page in range(pages):
            if self.pages[number * pages + page]:
                where = address + _PREFIX + 4 + page * (_PAGE_BYTES + 4)
                data = file.part(where, _PAGE_BYTES + 4)
                check(data[:_PAGE_BYTES], data[_PAGE_BYTES:], b"")
                yield begin + page * _IN_PAGE, _addresses(data[:_PAGE_BYTES], 0)


def _of_level(file: FileBytes, address: int, count: int, elements: int) -> _Blocks:
    if address == NOWHERE:
        return _Blocks(np.empty(0, dtype=np.uint64))
    pages = elements // _IN_PAGE if elements > _IN_PAGE else 0
    bits = count * -(-pages // 8)
    block = file.block(address, _PREFIX + bits + 8 * count, b"EASB")
    if not pages:
        return _Blocks(_addresses(block, _PREFIX))
    written = np.unpackbits(np.frombuffer(block, np.uint8, bits, _PREFIX))
    return _Blocks(_addresses(block, _PREFIX + bits), written)


def _addresses(block: bytes, start: int) -> npt.NDArray[np.uint64]:
    return np.frombuffer(block, "<u8", offset=start)


def chunks_of_tree(file: FileBytes, address: int, dimensions: int, first: int, last: int) -> Chunks:
    """The chunks of a B-tree whose first place is from ``first`` to ``last``."""
    tree = _TREE.unpack(file.block(address, _TREE.size, b"BTHD"))
    _, version, kind, node_bytes, record_bytes, depth, _, _, root, records, _ = tree
    numbers = 1 + dimensions  # in a record
    if (version, kind, record_bytes) != (0, _CHUNK_TREE, 8 * numbers) or depth > _MOST_DEPTH:
        raise ValueError("its tree of chunks is of another make")
    sizes = _Sizes(node_bytes, record_bytes, depth)
    found = [np.empty((0, numbers), dtype=np.uint64)]
    nodes = np.array([[root, records]], dtype=np.int64) if records else np.empty((0, 2), np.int64)
    for level in range(depth, -1, -1):
        sizes.check(nodes, level, file.size)
        children = [np.empty((0, 2), dtype=np.int64)]
        for count in np.unique(nodes[:, 1]).tolist():
            offsets = nodes[nodes[:, 1] == count, 0].tolist()
            size = _NODE_PREFIX + count * record_bytes + sizes.pointers(count, level)
            blocks = file.blocks(offsets, size, b"BTIN" if level else b"BTLF")
            end = _NODE_PREFIX + count * record_bytes
            of_nodes = np.ascontiguousarray(blocks[:, _NODE_PREFIX:end]).view("<u8")
            of_nodes = of_nodes.reshape(len(offsets), count, numbers)
            found.append(of_nodes.reshape(-1, numbers))
            if level:
                below = sizes.children(blocks[:, end:], level)
                children.append(_in_range(of_nodes[:, :, 1], below, first, last))
        nodes = np.concatenate(children)
    whole = np.concatenate(found)
    whole = whole[(whole[:, 1] >= first) & (whole[:, 1] <= last)]
    return Chunks(_signed(whole[:, 1:]), _signed(whole[:, 0]))


def _in_range(firsts: npt.NDArray[np.uint64], children: _Nodes, first: int, last: int) -> _Nodes:
    """The children between records, whose first places are ``firsts``, that are in the range.

    Shapes: (nodes, records) and (nodes, records + 1, 2).
    """
    wanted = np.ones(children.shape[:2], dtype=np.bool_)
    wanted[:, 1:] &= firsts <= last
    wanted[:, :-1] &= firsts >= first
    kept: _Nodes = children[wanted]
    return kept


class _Sizes:
    """How much the nodes of a tree hold, by their level; that of leaves is 0."""

    def __init__(self, node_bytes: int, record_bytes: int, depth: int) -> None:
        self._node_bytes = node_bytes
        free = node_bytes - _NODE_PREFIX - 4
        most = [free // record_bytes]  # records of a node
        below = [most[0]]  # and of all that are below it
        self._count_bytes = _bytes_for(most[0])
        self._total_bytes = [0]  # of the number of those below a child, which leaves do not have
        for level in range(1, depth + 1):
            pointer = self._pointer(level)
            most.append((free - pointer) // (record_bytes + pointer))
            below.append((most[level] + 1) * below[level - 1] + most[level])
            self._total_bytes.append(_bytes_for(below[level]))
        self._most = most
        if min(most) < 1:
            raise ValueError("the nodes of its tree of chunks have no room")

    def _pointer(self, level: int) -> int:
        return 8 + self._count_bytes + self._total_bytes[level - 1]

    def pointers(self, records: int, level: int) -> int:
        """The bytes of all pointers to the children of a node."""
        return (records + 1) * self._pointer(level) if level else 0

    def children(self, pointers: npt.NDArray[np.uint8], level: int) -> _Nodes:
        """Addresses and numbers of records of children, shape (nodes, children, 2)."""
        size = self._pointer(level)
        each = pointers.reshape(len(pointers), -1, size)
        addresses = np.ascontiguousarray(each[:, :, :8]).view("<u8")[:, :, 0]
        counts = np.zeros((*each.shape[:2], 8), dtype=np.uint8)
        counts[:, :, : self._count_bytes] = each[:, :, 8 : 8 + self._count_bytes]
        return np.stack([_signed(addresses), _signed(counts.view("<u8")[:, :, 0])], axis=2)

    def check(self, nodes: _Nodes, level: int, size: int) -> None:
        """Raise ValueError for nodes that a file of ``size`` bytes cannot have."""
        addresses, counts = nodes.T
        is_possible = len(np.unique(addresses)) == len(nodes)
        is_possible &= len(nodes) <= 1 or len(nodes) * self._node_bytes <= 2 * size
        if not (is_possible and (counts > 0).all() and (counts <= self._most[level]).all()):
            raise ValueError("its tree of chunks is damaged")


def _bytes_for(number: int) -> int:
    """The bytes that HDF5 takes for numbers up to this one."""
    return (max(1, number).bit_length() - 1) // 8 + 1


def _signed(numbers: npt.NDArray[np.uint64]) -> Integers:
    if len(numbers) and numbers.max() >= 1 << 62:
        raise ValueError("it points beyond the end of any file")
    return numbers.astype(np.int64)
