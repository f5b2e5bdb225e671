"""What the header of a dataset in an HDF5 file says, read without HDF5.

HDF5 acts upon a header when it opens the dataset: it looks for parts in other files and loads what
decompresses. So what is to be refused has to be known before. Only what version 1.10 and later
write of plain datasets is understood (HDF5 File Format Specification 3.0, IV.A).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_ADDRESSED = struct.Struct("<QQ")
_MOST_BYTES, _MOST_BLOCKS = 1 << 16, 8  # of a header; a writer of segments makes one of 300 bytes
_SPACE, _TYPE, _LAYOUT, _CONTINUATION = 0x01, 0x03, 0x08, 0x10
# Padding, values of what is not there, attributes and where more of them are, and times.
_HARMLESS = frozenset((0x00, 0x05, 0x0C, 0x12, 0x15))
_SHARED = 0x02  # the flag of a message that lies elsewhere

Read = Callable[[int, int], bytes]
"""Takes an offset and a size; what lies beyond the end of a file is missing."""


@dataclass(frozen=True)
class Header:
    """What a dataset is like.

    ``type`` are the bytes that describe an element, without the version of their encoding.
    ``chunk`` is the shape of a chunk; empty where the elements lie in one block.
    """

    type: bytes
    dimensions: int
    chunk: tuple[int, ...]

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk; of a dataset in one block that of an element."""
        return math.prod(self.chunk) * int.from_bytes(self.type[4:8], "little")


def read_header(read: Read, address: int) -> Header:
    """Return what the header at ``address`` says.

    Raises ValueError for one that is damaged, and for a dataset that is virtual, in other files,
    compressed or filtered, or otherwise unlike a plain one.
    """
    found: dict[int, bytes] = {}
    for kind, flags, data in _messages(read, address):
        if kind in _HARMLESS:
            continue
        if kind not in (_SPACE, _TYPE, _LAYOUT) or flags & _SHARED or kind in found:
            raise ValueError(f"a message of type {kind:#x} in the header, which no writer makes")
        found[kind] = data
    if len(found) < 3:
        raise ValueError("its header lacks a part")
    try:
        return Header(
            type=bytes([found[_TYPE][0] & 0x0F]) + found[_TYPE][1:],
            dimensions=found[_SPACE][1],
            chunk=_chunk(found[_LAYOUT]),
        )
    except (IndexError, struct.error) as error:
        raise ValueError("its header is too short") from error


def _messages(read: Read, address: int) -> Iterator[tuple[int, int, bytes]]:
    """Type, flags and data of each message."""
    start = read(address, 32)
    if start[:5] != b"OHDR\2":
        raise ValueError("its header is not of version 2")
    flags = start[5]
    place = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    size = int.from_bytes(start[place : place + width], "little")
    blocks = [(address + place + width, size)]
    extra = 2 if flags & 0x04 else 0
    for number in range(_MOST_BLOCKS):
        if number == len(blocks):
            return
        offset, size = blocks[number]
        if size > _MOST_BYTES:
            raise ValueError(f"its header has {size:,} bytes")
        for kind, message_flags, data in _of_block(read(offset, size), extra):
            if kind != _CONTINUATION:
                yield kind, message_flags, data
                continue
            where, length = _ADDRESSED.unpack_from(data.ljust(_ADDRESSED.size, b"\0"))
            blocks.append((where + 4, length - 8))  # without the signature and the checksum
    raise ValueError("its header is in too many parts")


def _of_block(block: bytes, extra: int) -> Iterator[tuple[int, int, bytes]]:
    place, head = 0, 4 + extra
    while len(block) - place >= head:  # what is less is a gap
        kind, size, flags = struct.unpack_from("<BHB", block, place)
        place += head
        if size > len(block) - place:
            raise ValueError("a message in its header is longer than the header")
        yield kind, flags, block[place : place + size]
        place += size


def _chunk(layout: bytes) -> tuple[int, ...]:
    """The shape of a chunk, without the size of an element; empty for one block."""
    version, kind = layout[0], layout[1]
    if version in (3, 4) and kind == 1:
        return ()
    if version != 4 or kind != 2:
        raise ValueError("it is virtual, or lies otherwise than in chunks or one block")
    dimensions, width = layout[3], layout[4]
    shape = [
        int.from_bytes(layout[5 + n * width : 5 + (n + 1) * width], "little")
        for n in range(dimensions)
    ]
    if not width or len(layout) < 5 + dimensions * width or 0 in shape:
        raise ValueError("its chunks have no shape")
    return tuple(shape[:-1])
