"""Runs on other machines and object stores: copied here to be read."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

MOST_TEXT = 256 << 20  # bytes of a file beside the segments; more is something else

_HERE = ("file://", "local://")
_NAME = re.compile(r"[^./\\\0][^/\\\0]{0,200}|samples/step-\d{1,20}\.npz")
"""What files of a run are called. Others, and what leads out of the folder, are not copied."""


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is an address that fsspec knows, such as ``s3://bucket/runs/gpt``."""
    return isinstance(path, str) and "://" in path and not path.startswith(_HERE)


def without_scheme(path: str | os.PathLike[str]) -> Path:
    """The path on this machine, also of an address such as ``file:///runs/gpt``."""
    if isinstance(path, str) and path.startswith(_HERE):
        return Path(path.partition("://")[2])
    return Path(path)


def fetched(address: str) -> TemporaryDirectory[str]:
    """A copy of the run at ``address``, as it is now, in a folder that goes with the object.

    Nothing is written but files of a run, in that folder.

    Raises:
        FileNotFoundError: if there is nothing.
        OSError: if it cannot be read, or has no room here.
        ImportError: if the package of that kind of store is not installed.
        ValueError: for a kind of store that fsspec does not know.
    """
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(address)
        found = system.find(root, detail=True)
        if not found:
            raise FileNotFoundError(f"there is nothing at {address}")
        return _copied(system, dict(_files(found, root)), found)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # each kind of store has its own
        raise OSError(f"{address} cannot be read: {error!r}") from error


def _copied(
    system: Any, files: dict[str, str], found: dict[str, dict[str, Any]]
) -> TemporaryDirectory[str]:
    """A folder with the ``files``: path in the store by path in the folder."""
    folder = TemporaryDirectory(prefix="tmm-")
    try:
        size = sum(int(found[path].get("size") or 0) for path in files.values())
        if size > (free := shutil.disk_usage(folder.name).free):
            text = f"a copy of the run has {size:,} bytes, and {free:,} are free"
            raise OSError(errno.ENOSPC, text, folder.name)
        # Segments come last: what they hold is never older than the rest.
        for name in sorted(files, key=lambda name: name.endswith(".h5")):
            local = Path(folder.name, name)
            local.parent.mkdir(exist_ok=True)
            system.get_file(files[name], str(local))
    except BaseException:
        folder.cleanup()
        raise
    return folder


def _files(found: dict[str, dict[str, Any]], root: str) -> Iterator[tuple[str, str]]:
    """Path in the folder, and in the store, of what may be a file of a run."""
    folder = root.rstrip("/")
    for path, info in found.items():
        name = path.removeprefix(folder).removeprefix("/")
        is_inside = path in (f"{folder}/{name}", name) and path.startswith(folder)
        is_small = (info.get("size") or 0) <= MOST_TEXT or name.endswith(".h5")
        if is_inside and is_small and _NAME.fullmatch(name):
            yield name, path
