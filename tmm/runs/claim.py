"""Which folder a run at a path that somebody gives is recorded into: one run at a path."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from tmm.runs.remote import address_of
from tmm.runs.state import STATE_NAME, Lock, State
from tmm.runtime.store.run_file import EXPLANATION_NAME, INFO_NAME, read_info
from tmm.runtime.store.run_writer import is_info_of_run
from tmm.runtime.store.segment_layout import segment_paths


@dataclass(frozen=True)
class Claim:
    """A folder to record into, and the lock on it.

    ``notice`` says why it is another one than was asked for; empty if it is that one. ``resumes``
    tells that it holds a run, which is to go on.
    """

    path: Path
    lock: Lock
    resumes: bool = False
    notice: str = ""


def claim(path: Path, *, resume: bool) -> Claim:
    """The folder ``path``, made where it is missing, or one beside it if that holds a run.

    With ``resume`` a run there goes on.

    Raises:
        ValueError: for what is not a run's, and for a run to go on with that is running.
        OSError: if it cannot be made, or is a file.
    """
    path = path if path.name not in ("", "..") else Path(os.path.abspath(path))
    if resume and path.is_dir() and holds_run(path):
        if not (path / INFO_NAME).exists():
            raise ValueError(f"run={str(path)!r} cannot go on: it has no {INFO_NAME}")
        known = lock_to_resume(path, f"run={str(path)!r}, resume=True")
        return Claim(path, known, resumes=True)
    taken = ""
    for candidate in _candidates(path):
        if candidate != path and candidate.exists():
            continue
        make_folder(candidate, "run")
        if (lock := _lock_if_free(candidate)) is not None:
            notice = "" if candidate == path else f"{taken}; this one is recorded into {candidate}"
            return Claim(candidate, lock, notice=notice)
        taken = taken or _how_taken(path)
    raise AssertionError("there is a free number")


def _lock_if_free(folder: Path) -> Lock | None:
    """The lock on a folder; None if a run lies in it, or another one begins there."""
    if holds_run(folder):
        return None
    try:
        lock = Lock(folder)
    except BlockingIOError:
        return None
    if holds_run(folder):  # another process was faster
        lock.release()
        return None
    return lock


def _how_taken(path: Path) -> str:
    try:
        state = State.read(path)
    except ValueError:
        state = None
    if state is not None and state.status == "running":
        return f"{path} is being recorded into by another run"
    if (path / INFO_NAME).exists():
        return f"{path} holds a run already (resume=True goes on with it)"
    if segment_paths(path):
        return f"{path} holds segments of a run that has lost its {INFO_NAME}"
    return f"{path} is being recorded into by another run"


def holds_run(folder: Path) -> bool:
    """Whether a run lies in a folder itself, whatever lies below.

    Raises:
        ValueError: for a file that is not a run's and has the name of one, or is damaged.
    """
    if (folder / INFO_NAME).exists():
        if not is_info_of_run(read_info(folder)):
            raise ValueError(
                f"run={str(folder)!r}: its {INFO_NAME} is of another program, and a run would"
                " replace it; give another folder"
            )
        return True
    if segment_paths(folder):
        return True
    for name in (STATE_NAME, EXPLANATION_NAME):
        if (folder / name).exists():
            raise ValueError(
                f"run={str(folder)!r} has a {name} and no {INFO_NAME}: it is no run's, and a run"
                " would replace it; give another folder"
            )
    return False


def make_folder(path: Path, argument: str) -> None:
    """Make a folder with those above it; one that exists is left alone.

    Raises:
        OSError: if it cannot be made, also because it is a file or would lie in one.
        ValueError: for an address, such as that of an object store.
    """
    check_is_here(path, argument)
    for part in (path, *path.parents):
        if part.exists() and not part.is_dir():
            raise NotADirectoryError(
                errno.ENOTDIR, f"{argument}={str(path)!r}: {part} is a file; give a folder"
            )
    path.mkdir(parents=True, exist_ok=True)


def check_is_here(path: str | os.PathLike[str], argument: str) -> None:
    """Raise ``ValueError`` for an address, such as that of an object store."""
    if (address := address_of(path)) is not None:
        raise ValueError(
            f"{argument}={address!r}: runs are recorded into folders of this machine; record into"
            " one, and copy it there"
        )


def lock_to_resume(folder: Path, argument: str) -> Lock:
    """The lock on a run that is to go on, taken before anything is read that may change.

    Raises:
        ValueError: if somebody records it, or its state is damaged.
    """
    state = State.read(folder)
    try:
        lock = Lock(folder)
    except BlockingIOError as error:
        raise ValueError(f"{argument}: the run {folder.name} is running already") from error
    if state is not None and state.status == "running" and not lock.is_held:
        raise ValueError(f"{argument}: the run {folder.name} is running already")
    return lock


def _candidates(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")
