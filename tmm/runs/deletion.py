"""Deleting a run: its own files, and nothing else that lies in its folder."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from secrets import token_hex

from tmm.runs.artifacts import FOLDER as SAMPLES
from tmm.runs.state import LOCK_NAME, STATE_NAME, Lock
from tmm.runtime.store.run_file import EXPLANATION_NAME, INFO_NAME

_FILES = re.compile(
    "|".join(
        (
            *map(re.escape, (INFO_NAME, STATE_NAME, LOCK_NAME, EXPLANATION_NAME)),
            r"(rank-\d+\.)?metrics-\d+\.h5",
            r"values\.(csv|jsonl)",  # of sinks that are not told where to write
            r"\.[^/]+\.partial",  # what a killed process has not finished
        )
    )
)
_FOLDERS = {
    SAMPLES: re.compile(r"step-\d+\.npz|\.[^/]+\.partial"),
    "tensorboard": re.compile(r"events\.out\.tfevents\..*"),
}


def delete_folder(path: Path, *, keeps_folder: bool = False) -> tuple[str, ...]:
    """Delete the run in a folder, and the folder if nothing else is in it.

    Gives the names of what is in it and is not the run's, which stays: other runs, and files of
    others. With ``keeps_folder`` it stays as well.

    Raises:
        ValueError: if the run is being recorded.
        OSError: if it cannot be deleted.
    """
    try:
        lock = Lock(path)  # so that nobody goes on with it now
    except BlockingIOError as error:
        raise ValueError(f"the run {path.name} is running; stop it first") from error
    try:
        return _delete(path, keeps_folder=keeps_folder)
    finally:
        lock.release()


def _delete(path: Path, *, keeps_folder: bool) -> tuple[str, ...]:
    own = list(_own_files(path))
    others = tuple(sorted(_others(path, own)))
    # Renamed first, so that a reader never sees half of it.
    if not others and not keeps_folder:
        doomed = path.with_name(f".{path.name}.{token_hex(4)}.deleted")
        path.rename(doomed)
        shutil.rmtree(doomed)
        return ()
    doomed = path / f".{token_hex(4)}.deleted"
    doomed.mkdir()
    for number, file in enumerate(own):
        file.rename(doomed / f"{number}")
    shutil.rmtree(doomed)
    for name in _FOLDERS:
        folder = path / name
        if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
            folder.rmdir()
    return others


def _own_files(path: Path) -> Iterator[Path]:
    """The files of the run; what makes it one comes first."""
    files = [entry for entry in path.iterdir() if _FILES.fullmatch(entry.name) and _is_file(entry)]
    yield from sorted(files, key=lambda file: (file.name != INFO_NAME, file.name))
    for name, pattern in _FOLDERS.items():
        folder = path / name
        if folder.is_dir() and not folder.is_symlink():
            yield from (e for e in folder.iterdir() if pattern.fullmatch(e.name) and _is_file(e))


def _others(path: Path, own: list[Path]) -> Iterator[str]:
    """What lies in the folder besides: folders are named once, with what is in them."""
    known = set(own)
    for entry in path.iterdir():
        if entry in known:
            continue
        is_ours = entry.name in _FOLDERS and entry.is_dir() and not entry.is_symlink()
        if not is_ours or any(inside not in known for inside in entry.iterdir()):
            yield entry.name + (os.sep if entry.is_dir() else "")


def _is_file(entry: Path) -> bool:
    return entry.is_symlink() or entry.is_file()
