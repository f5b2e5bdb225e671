"""Runs on other machines and object stores: copied here to be read."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is an address that fsspec knows, such as ``s3://bucket/runs/gpt``."""
    return isinstance(path, str) and "://" in path


def fetched(address: str) -> TemporaryDirectory[str]:
    """A copy of the run at ``address``, as it is now, in a folder that goes with the object.

    Raises:
        FileNotFoundError: if there is nothing.
        ImportError: if the package of that kind of store is not installed.
        ValueError: for a kind of store that fsspec does not know.
    """
    import fsspec

    system, root = fsspec.core.url_to_fs(address)
    files = [path for path in system.find(root) if not Path(path).name.startswith(".")]
    if not files:
        raise FileNotFoundError(f"there is nothing at {address}")
    folder = TemporaryDirectory(prefix="tmm-")
    prefix = len(root.rstrip("/")) + 1
    try:
        # Segments come last: what they hold is never older than the rest.
        for path in sorted(files, key=lambda path: path.endswith(".h5")):
            local = Path(folder.name, path[prefix:])
            local.parent.mkdir(parents=True, exist_ok=True)
            system.get_file(path, str(local))
    except BaseException:
        folder.cleanup()
        raise
    return folder
