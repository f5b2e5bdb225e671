"""The root of an HDF5 file: its attributes, and where its datasets lie and what they are like.

Only what version 1.10 and later write of plain datasets in one group is understood (HDF5 File
Format Specification 3.0, chapters II to IV). All else is refused with a ValueError: what is
virtual, in other files, compressed, or of elements of varying length.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tmm.runtime.store.hdf5_bytes import NOWHERE, FileBytes, check

# Signature; version, sizes of addresses and of lengths, flags; addresses of the base, of the
# extension, of the end and of the root. The end may lag behind, where a writer is at work.
_SUPERBLOCK = struct.Struct("<8s4B4Q")
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_TREE = struct.Struct("<4sBBIHHBBQHQ")  # see `hdf5_chunks`
_HEAP = struct.Struct("<4sBHHBI12QHQQHHQH")
_LINK_RECORD = struct.Struct("<IBIH")  # hash of the name; kind, offset and length of the link
_LINK_TREE = 5
_ADDRESSES = struct.Struct("<QQ")

# Kinds of messages in the header of an object.
_SPACE, _LINKS, _TYPE, _EXTERNAL, _LINK, _LAYOUT = 0x01, 0x02, 0x03, 0x07, 0x06, 0x08
_FILTERS, _ATTRIBUTE, _CONTINUATION = 0x0B, 0x0C, 0x10
# Padding, values of what is not there, of groups, where more attributes are, and times.
_HARMLESS = frozenset((0x00, 0x05, 0x0A, 0x12, 0x15))
_SHARED = 0x02  # a flag: what the message says lies elsewhere
_MOST_PARTS = 8  # of a header

INTEGER = bytes.fromhex("00 080000 08000000 0000 4000")
"""The type of elements that are int64, little-endian: class, bits, size, offset and precision."""
BYTE = bytes.fromhex("00 000000 01000000 0000 0800")
FLOAT = bytes.fromhex("01 203f00 08000000 0000 4000 34 0b 00 34 ff030000")


@dataclass(frozen=True)
class Layout:
    """What a dataset is like.

    ``type`` are the bytes that describe its elements. ``chunk`` is the shape of a chunk, and
    ``address`` is that of their index, which is a tree or an array; without chunks, that of the
    elements.
    """

    type: bytes
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    index: int
    address: int

    @property
    def element_bytes(self) -> int:
        """The size of an element."""
        return int.from_bytes(self.type[4:8], "little")

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk."""
        return math.prod(self.chunk) * self.element_bytes


@dataclass(frozen=True)
class Root:
    """The root group: the addresses of its objects, and its attributes that are whole numbers.

    An attribute that is something else is None.
    """

    objects: dict[str, int]
    attributes: dict[str, int | None]


def read_root(file: FileBytes) -> Root:
    """Return what is in the root group of a file."""
    block = file.block(0, _SUPERBLOCK.size, _SIGNATURE)
    _, version, addresses, lengths, _, base, extension, _, root = _SUPERBLOCK.unpack(block)
    if (version, addresses, lengths, base, extension) != (3, 8, 8, 0, NOWHERE):
        raise ValueError("it is no HDF5 file of version 3")
    objects: dict[str, int] = {}
    attributes: dict[str, int | None] = {}
    for kind, data in _messages(file, root):
        if kind == _LINKS:
            for link in _dense_links(file, data):
                objects |= _link(link)
        elif kind == _LINK:
            objects |= _link(data)
        elif kind == _ATTRIBUTE:
            attributes |= _attribute(data)
        elif kind not in _HARMLESS:
            raise ValueError(f"a message of kind {kind:#x} in its root")
    return Root(objects, attributes)


def read_layout(file: FileBytes, address: int, *, checked: bool = True) -> Layout:
    """Return what the dataset at an address is like; ``checked`` is to find out what is damaged."""
    found: dict[int, bytes] = {}
    for kind, data in _messages(file, address, checked=checked):
        if kind in _HARMLESS or kind == _ATTRIBUTE:
            continue
        if kind in (_EXTERNAL, _FILTERS):
            raise ValueError("it is compressed, or lies in other files")
        if kind not in (_SPACE, _TYPE, _LAYOUT) or kind in found:
            raise ValueError(f"a message of kind {kind:#x} in its header")
        found[kind] = data
    if len(found) < 3:
        raise ValueError("it is no dataset")
    try:
        kind_of_type = bytes([found[_TYPE][0] & 0x0F]) + found[_TYPE][1:]
        return Layout(kind_of_type, _shape(found[_SPACE]), *_storage(found[_LAYOUT]))
    except (IndexError, struct.error) as error:
        raise ValueError("its header is too short") from error


def _messages(
    file: FileBytes, address: int, *, checked: bool = True
) -> Iterator[tuple[int, bytes]]:
    """Kind and data of each message in the header of an object."""
    start = file.at(address, 32)
    if start[:5] != b"OHDR\2":
        raise ValueError("there is no header of version 2")
    flags = start[5]
    place = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    size = place + width + int.from_bytes(start[place : place + width], "little")
    parts = [(address, size, b"OHDR", place + width)]
    head = 6 if flags & 0x04 else 4
    for number in range(_MOST_PARTS):
        if number == len(parts):
            return
        offset, size, signature, begin = parts[number]
        whole = file.block(offset, size, signature) if checked else file.part(offset, size)
        for kind, data in _of_part(whole[begin:], head):
            if kind != _CONTINUATION:
                yield kind, data
            elif len(data) >= _ADDRESSES.size:
                where, length = _ADDRESSES.unpack_from(data)
                parts.append((where, max(0, length - 4), b"OCHK", 4))
    raise ValueError("its header is in too many parts")


def _of_part(part: bytes, head: int) -> Iterator[tuple[int, bytes]]:
    place = 0
    while len(part) - place >= head:  # what is less is a gap
        kind, size, flags = struct.unpack_from("<BHB", part, place)
        place += head
        if size > len(part) - place or flags & _SHARED:
            raise ValueError("its header is damaged, or shared")
        yield kind, part[place : place + size]
        place += size


def _shape(space: bytes) -> tuple[int, ...]:
    version, dimensions, kind = space[0], space[1], space[3]
    if version != 2 or kind > 1:
        raise ValueError("it has no shape")
    return struct.unpack_from(f"<{dimensions}Q", space, 4)


def _storage(layout: bytes) -> tuple[tuple[int, ...], int, int]:
    """Shape of a chunk, kind of their index, and address; without chunks the first are nothing."""
    version, kind = layout[0], layout[1]
    if version in (3, 4) and kind == 1:
        return (), 0, struct.unpack_from("<Q", layout, 2)[0]
    if version != 4 or kind != 2:
        raise ValueError("it is virtual, or lies otherwise than in chunks or in one block")
    dimensions, width = layout[3], layout[4]
    place = 5 + dimensions * width
    chunk = tuple(
        int.from_bytes(layout[start : start + width], "little") for start in range(5, place, width)
    )
    if not chunk or 0 in chunk:
        raise ValueError("its chunks have no shape")
    index = layout[place]
    parameters = {4: 5, 5: 6}.get(index)
    if parameters is None:
        raise ValueError(f"its chunks are found by an index of kind {index}")
    # The last number is the size of an element.
    return chunk[:-1], index, struct.unpack_from("<Q", layout, place + 1 + parameters)[0]


def _attribute(data: bytes) -> dict[str, int | None]:
    """An attribute by its name; None for one that is no whole number."""
    if len(data) < 9 or data[0] not in (2, 3):
        raise ValueError("it has an attribute of another version")
    name_bytes, type_bytes, space_bytes = struct.unpack_from("<3H", data, 2)
    place = 9 if data[0] == 3 else 8
    name = data[place : place + name_bytes].rstrip(b"\0").decode("utf-8", "replace")
    place += name_bytes
    kind = data[place : place + type_bytes]
    place += type_bytes
    space = data[place : place + space_bytes]
    place += space_bytes
    is_number = kind[:1] and bytes([kind[0] & 0x0F]) + kind[1:] == INTEGER
    is_single = space[:2] == b"\2\0" and space[3:4] == b"\0"
    if not (is_number and is_single and len(data) >= place + 8):
        return {name: None}
    return {name: int.from_bytes(data[place : place + 8], "little", signed=True)}


def _link(data: bytes) -> dict[str, int]:
    """Where an object lies, by its name; raises ValueError for a link to another place."""
    try:
        version, flags = data[0], data[1]
        place = 2
        if flags & 0x08:
            if data[place] != 0:
                raise ValueError("one of its datasets is a link to elsewhere")
            place += 1
        place += (8 if flags & 0x04 else 0) + (1 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        length = int.from_bytes(data[place : place + width], "little")
        place += width
        name = data[place : place + length].decode()
        (address,) = struct.unpack_from("<Q", data, place + length)
    except (IndexError, struct.error) as error:
        raise ValueError("a link in its root is damaged") from error
    if version != 1:
        raise ValueError("a link in its root is of another version")
    return {name: address}


def _dense_links(file: FileBytes, info: bytes) -> Iterator[bytes]:
    """The links of a group that has more of them than fit into its header."""
    if len(info) < 2 or info[0] != 0:
        raise ValueError("its root has links of another version")
    place = 2 + (8 if info[1] & 1 else 0)
    heap_address, tree_address = _ADDRESSES.unpack_from(info.ljust(place + 16, b"\0"), place)
    if heap_address == NOWHERE:
        return
    heap = _heap(file, heap_address)
    tree = _TREE.unpack(file.block(tree_address, _TREE.size, b"BTHD"))
    kind, record_size, depth, root, records = tree[2], tree[4], tree[5], tree[8], tree[9]
    if (kind, record_size, depth) != (_LINK_TREE, _LINK_RECORD.size, 0):
        raise ValueError("its root has links in another order, or too many")
    leaf = file.block(root, 6 + records * record_size, b"BTLF")
    for _, of_heap, offset, length in _LINK_RECORD.iter_unpack(leaf[6:]):
        if of_heap or offset + length > len(heap):
            raise ValueError("a link in its root is not where it should be")
        yield heap[offset : offset + length]


def _heap(file: FileBytes, address: int) -> bytes:
    """The only block of the heap that holds the links."""
    fields = _HEAP.unpack(file.block(address, _HEAP.size, b"FRHP"))
    id_bytes, filters, flags, bits = fields[2], fields[3], fields[4], fields[21]
    size, root, rows = fields[19], fields[23], fields[24]
    if (id_bytes, filters, bits, rows) != (7, 0, 32, 0):
        raise ValueError("its root has links in another kind of heap, or too many")
    block = file.part(root, size)
    # Signature, version, address of the heap, offset; then the checksum of all but itself.
    if flags & 0x02:
        check(block[:17] + b"\0" * 4 + block[21:], block[17:21], b"FHDB")
    return block
