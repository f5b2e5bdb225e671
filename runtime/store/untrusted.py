"""Files that somebody else may have written: read without waiting, and no more than is sensible."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

DEEPEST = 100
"""How many objects and arrays of JSON may lie inside of one another."""

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_BINARY"))
_ESCAPED = re.compile(rb"\\.", re.DOTALL)


def open_file(path: Path) -> int:
    """Open a regular file for reading, and return its descriptor.

    Links are followed. Raises ValueError for a FIFO, device, socket or folder, which are not
    opened, as that may wait for ever or do something; and OSError.
    """
    _check_kind(path, os.stat(path).st_mode)
    descriptor = os.open(path, _FLAGS)
    try:
        _check_kind(path, os.fstat(descriptor).st_mode)  # it may have been replaced since
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(path: Path, most: int) -> bytes:
    """Return what a regular file holds.

    Raises ValueError for one of more than ``most`` bytes, which is not read, and as `open_file`.
    """
    with open(open_file(path), "rb", buffering=0) as file:
        size, data = os.fstat(file.fileno()).st_size, bytearray()
        while max(size, len(data)) <= most and (part := file.read(max(size, 4096) + 1)):
            data += part
    if (size := max(size, len(data))) > most:
        raise ValueError(f"{path} has {size:,} bytes; at most {most:,} are read")
    return bytes(data)


def parse_json(text: bytes) -> Any:
    """Return what a text of JSON says; raises ValueError, also for one that is nested deeply."""
    if text.count(b"[") + text.count(b"{") > DEEPEST and _depth(text) > DEEPEST:
        raise ValueError(f"more than {DEEPEST} objects or arrays are nested")
    try:
        return json.loads(text)
    except RecursionError as error:  # somebody has set a lower limit
        raise ValueError("it is nested too deeply") from error


def _depth(text: bytes) -> int:
    """How many brackets are open at once; brackets in strings do not count."""
    import numpy as np  # slow to import

    characters = np.frombuffer(_ESCAPED.sub(b"", text), dtype=np.uint8)
    in_string = np.logical_xor.accumulate(characters == ord('"'))
    change = np.zeros(256, dtype=np.int8)  # of the depth, by the number of a character
    change[list(b"[{")], change[list(b"]}")] = 1, -1
    changes = change[characters]
    changes[in_string] = 0
    return int(changes.cumsum(dtype=np.int32).max(initial=0))


def _check_kind(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ValueError(f"{path} is {kind}, not a file")
