"""The bytes of an HDF5 file, and the checksum by which its blocks tell that they are whole."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tmm.runtime.store.untrusted import open_file

NOWHERE = (1 << 64) - 1
"""The address of what is not there."""

_CHECKSUM_BYTES = 4
_MOST_BLOCK = 1 << 20  # bytes of a block of metadata; those of segments have some thousands
_WORD = 0xFFFFFFFF

_Words = npt.NDArray[np.uint32]


class FileBytes:
    """A file, read at any place; zeros follow its end. Raises ValueError and OSError.

    A writer that was killed leaves a file that is shorter than what it has room for.
    ``size`` is that of the file when it was opened, in bytes.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = open_file(path)
        self.size = os.fstat(self._descriptor).st_size

    def at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on."""
        if not 0 <= offset <= offset + size < 1 << 63:
            raise ValueError(f"it points to its byte {offset}")
        return os.pread(self._descriptor, size, offset).ljust(size, b"\0")

    def part(self, offset: int, size: int) -> bytes:
        """Return a part of the metadata, as `at` does, without a look at what it says."""
        if size > _MOST_BLOCK:
            raise ValueError(f"it has metadata of {size:,} bytes in one block")
        return self.at(offset, size)

    def block(self, offset: int, size: int, signature: bytes) -> bytes:
        """Return a block of ``size`` bytes, behind which there is its checksum.

        It begins with ``signature``.
        """
        data = self.part(offset, size + _CHECKSUM_BYTES)
        check(data[:size], data[size:], signature)
        return data[:size]

    def blocks(self, offsets: list[int], size: int, signature: bytes) -> npt.NDArray[np.uint8]:
        """Return blocks as `block` does, as rows of shape (offsets, size)."""
        if len(offsets) < _FEW_BLOCKS:
            few = b"".join(self.block(offset, size, signature) for offset in offsets)
            return np.frombuffer(few, dtype=np.uint8).reshape(-1, size)
        whole = size + _CHECKSUM_BYTES
        joined = b"".join(self.part(offset, whole) for offset in offsets)
        data = np.frombuffer(joined, dtype=np.uint8)
        data = data.reshape(-1, whole)
        found = np.ascontiguousarray(data[:, size:]).view("<u4")[:, 0]
        begin = np.frombuffer(signature, dtype=np.uint8)
        is_whole = (data[:, : len(begin)] == begin).all(axis=1)
        is_whole &= checksums(data[:, :size]) == found
        if not is_whole.all():
            raise ValueError(_NOT_WHOLE.format(signature))
        return data[:, :size]

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def check(block: bytes, found: bytes, signature: bytes) -> None:
    """Raise ValueError for a block with another beginning, or another checksum than ``found``."""
    if not block.startswith(signature) or checksum(block) != int.from_bytes(found, "little"):
        raise ValueError(_NOT_WHOLE.format(signature))


_NOT_WHOLE = "a block {} is damaged, or elsewhere"
_FEW_BLOCKS = 12  # up to which they are faster one by one


def checksum(data: bytes) -> int:
    """Return the checksum that HDF5 uses: lookup3, a hash by Bob Jenkins."""
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    if not data:
        return c
    # The last 1 to 12 bytes are mixed otherwise.
    end = (len(data) - 1) // 12 * 12
    for x, y, z in struct.iter_unpack("<3I", data[:end]):
        a, b, c = (a + x) & _WORD, (b + y) & _WORD, (c + z) & _WORD
        a = ((a - c) ^ (c << 4 | c >> 28)) & _WORD
        c = (c + b) & _WORD
        b = ((b - a) ^ (a << 6 | a >> 26)) & _WORD
        a = (a + c) & _WORD
        c = ((c - b) ^ (b << 8 | b >> 24)) & _WORD
        b = (b + a) & _WORD
        a = ((a - c) ^ (c << 16 | c >> 16)) & _WORD
        c = (c + b) & _WORD
        b = ((b - a) ^ (a << 19 | a >> 13)) & _WORD
        a = (a + c) & _WORD
        c = ((c - b) ^ (b << 4 | b >> 28)) & _WORD
        b = (b + a) & _WORD
    x, y, z = struct.unpack("<3I", data[end:].ljust(12, b"\0"))
    a, b, c = (a + x) & _WORD, (b + y) & _WORD, (c + z) & _WORD
    for shift in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, ((c ^ b) - (b << shift | b >> (32 - shift))) & _WORD, a
    return int(b)


def checksums(blocks: npt.NDArray[np.uint8]) -> _Words:
    """As `checksum` for each of many blocks of one size, shape (blocks, size)."""
    count, size = blocks.shape
    padded = np.zeros((count, -(-size // 12) * 12), dtype=np.uint8)
    padded[:, :size] = blocks
    words = np.ascontiguousarray(padded.view("<u4").T)
    a = np.full(count, (0xDEADBEEF + size) & _WORD, dtype=np.uint32)
    b, c = a.copy(), a.copy()
    for place in range(0, len(words) - 3, 3):
        a, b, c = a + words[place], b + words[place + 1], c + words[place + 2]
        for shift in (4, 6, 8, 16, 19, 4):
            a, b, c = b, c + b, (a - c) ^ (c << shift | c >> (32 - shift))
    a, b, c = a + words[-3], b + words[-2], c + words[-1]
    for shift in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, (c ^ b) - (b << shift | b >> (32 - shift)), a
    found: _Words = b
    return found
