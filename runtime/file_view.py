"""What HDF5 gets to see of a segment that it reads, through the file-object driver of h5py.

The beginning of an HDF5 file says how long the file is, and HDF5 refuses a file that is shorter,
and addresses beyond. Both occur where a writer is at work, and for good where it was killed between
two of its writes, although everything that was committed is there. So the length is let be endless;
`SegmentReader` knows from the commits whether something is missing. What is larger than the file
itself is not read at once: no writer asks for that.
"""

from __future__ import annotations

import io
import os
import struct
from typing import Any

# Signature; version, sizes of addresses and of lengths, flags; addresses of the base, of the
# extension, of the end and of the root; checksum of all that.
_SUPERBLOCK = struct.Struct("<8s4B4QI")
_VERSION, _END, _CHECKSUM = 1, 7, 9
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_BASE, _EXTENSION = 5, 6
_NOWHERE = (1 << 64) - 1
_ENDLESS = 1 << 62
_MOST_AT_ONCE = 32 << 20  # bytes, of a file that is smaller than that
_WORD = 0xFFFFFFFF


class FileView(io.RawIOBase):
    """A file, read only and endless: zeros follow. It owns ``descriptor``.

    ``size`` is its real one; ``is_sound`` tells that it begins as a writer of segments lets it.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._position = 0
        self._beginning = _endless(os.pread(descriptor, _SUPERBLOCK.size, 0))
        self.size = os.fstat(descriptor).st_size
        self.is_sound = bool(self._beginning)

    def readable(self) -> bool:
        """Tell that it can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that it has a position."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Move to ``offset`` from the beginning, or to the end."""
        self._position = _ENDLESS if whence == os.SEEK_END else offset
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        """Fill ``buffer``; at offsets of its own, as children of this process share the file's."""
        view = memoryview(buffer).cast("B")
        if len(view) > max(_MOST_AT_ONCE, self.size):
            raise OSError(f"{len(view):,} bytes at once, of a file of {self.size:,}")
        read = os.preadv(self._descriptor, [view], self._position)
        view[read:] = bytes(len(view) - read)
        beginning = self._beginning[self._position : self._position + len(view)]
        view[: len(beginning)] = beginning
        self._position += len(view)
        return len(view)

    def at(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset`` on, or as many as there are."""
        return os.pread(self._descriptor, size, offset)

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def _endless(superblock: bytes) -> bytes:
    """Return the superblock with another end of file; nothing for one that no segment has."""
    if len(superblock) < _SUPERBLOCK.size:
        return b""
    fields = list(_SUPERBLOCK.unpack(superblock))
    is_plain = fields[_BASE] == 0 and fields[_EXTENSION] == _NOWHERE
    as_expected = fields[0] == _SIGNATURE and fields[_VERSION] == 3 and is_plain
    if not as_expected or fields[_CHECKSUM] != _lookup3(superblock[:-4]):
        return b""
    fields[_END] = _ENDLESS >> 1
    fields[_CHECKSUM] = _lookup3(_SUPERBLOCK.pack(*fields)[:-4])
    return _SUPERBLOCK.pack(*fields)


def _lookup3(data: bytes) -> int:
    """Return the checksum that HDF5 uses, a hash by Bob Jenkins, of a multiple of 4 bytes."""
    words: tuple[int, ...] = struct.unpack(f"<{len(data) // 4}I", data)
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    while len(words) > 3:
        a, b, c = (a + words[0]) & _WORD, (b + words[1]) & _WORD, (c + words[2]) & _WORD
        words = words[3:]
        for shift in (4, 6, 8, 16, 19, 4):
            a, b, c = b, (c + b) & _WORD, ((a - c) & _WORD) ^ _rotate(c, shift)
    a, b, c = ((x + y) & _WORD for x, y in zip((a, b, c), (*words, 0, 0)[:3], strict=True))
    for shift in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, ((c ^ b) - _rotate(b, shift)) & _WORD, a
    return b


def _rotate(word: int, shift: int) -> int:
    return (word << shift | word >> (32 - shift)) & _WORD
