"""Runs on other machines and object stores: copied here to be read."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from typing import Any

from tmm.runs.state import LOCK_NAME

MOST_TEXT = 256 << 20  # bytes of a file beside the segments; more is something else

_HERE = ("file://", "local://")
_SCHEME = r"[a-z][a-z0-9+.-]+"
_ADDRESS = re.compile(rf"((?:{_SCHEME}::)*{_SCHEME}):/(?!/)(.*)", re.DOTALL)
"""An address that was made a path, which has lost one of its slashes."""

_NAME = re.compile(r"[^./\\\0][^/\\\0]{0,200}|samples/step-\d{1,20}\.npz")
"""What files of a run are called. Others, and what leads out of the folder, are not copied."""


def address_of(path: str | os.PathLike[str]) -> str | None:
    """The address that fsspec knows, such as ``s3://bucket/runs/gpt``; None for a path of here.

    Also of a `Path` that was made of an address.
    """
    text = _text(path)
    return text if "://" in text and not text.startswith(_HERE) else None


def without_scheme(path: str | os.PathLike[str]) -> Path:
    """The path on this machine, also of an address such as ``file:///runs/gpt``."""
    text = _text(path)
    if text.startswith(_HERE):
        return Path(text.partition("://")[2])
    return Path(path)


def _text(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if isinstance(path, PurePath) and (found := _ADDRESS.fullmatch(text)):
        scheme, rest = found.groups()
        if not os.path.lexists(f"{scheme}:"):  # a folder of that name, here
            return f"{scheme}:///{rest}" if f"{scheme}://" in _HERE else f"{scheme}://{rest}"
    return text


def fetched(address: str) -> TemporaryDirectory[str]:
    """A copy of the run at ``address``, as it is now, in a folder that goes with the object.

    Nothing is written but files of a run, in that folder.

    Raises:
        FileNotFoundError: if there is nothing.
        OSError: if it cannot be read, or has no room here.
        ImportError: if the package of that kind of store is not installed.
        ValueError: for a kind of store that fsspec does not know.
    """
    with in_store(address) as store:
        return _copied(store.system, dict(_files(store.files, store.root)), store.files)


@dataclass(frozen=True)
class Store:
    """What lies at an address: what fsspec knows of each file, by its path in the store."""

    system: Any
    root: str
    files: dict[str, dict[str, Any]]


@contextmanager
def in_store(address: str) -> Iterator[Store]:
    """What lies at ``address``, all that is below it; raises as `fetched`, also in the block."""
    import fsspec

    try:
        system, root = fsspec.core.url_to_fs(address)
        files = system.find(root, detail=True)
        if not files:
            raise FileNotFoundError(f"there is nothing at {address}")
        yield Store(system, root, files)
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
        # A lock says nothing where nobody can hold it.
        if is_inside and is_small and name != LOCK_NAME and _NAME.fullmatch(name):
            yield name, path
