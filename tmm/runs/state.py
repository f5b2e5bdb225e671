"""What became of a run: kept in its folder, and by a lock that only a living process holds."""

from __future__ import annotations

import errno
import json
import os
import platform
import stat
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, get_args

from tmm.core.atomic_file import replace_text
from tmm.runtime.store.untrusted import open_file, parse_json, read_file

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

STATE_NAME = "state.json"
LOCK_NAME = "alive.lock"
_ROOM = 4096  # bytes; a block of most file systems

Status: TypeAlias = Literal["running", "finished", "failed", "stopped", "crashed", "broken"]
STATUSES: tuple[Status, ...] = get_args(Status)

MOST_BYTES = 1 << 20
_MOST_REASON = 100_000  # characters
_TEXTS = ("started", "ended", "reason", "host")
_GONE = "its process is gone"


@dataclass(frozen=True)
class State:
    """What a run's process says of it.

    ``status`` is "running" until the process says otherwise; ``reason`` says why it failed or was
    stopped early. Times are ISO 8601, in UTC.
    """

    status: Status
    started: str
    ended: str = ""
    reason: str = ""
    last_step: int | None = None
    process: int = 0
    host: str = ""

    @staticmethod
    def begin() -> State:
        """The state of a run that this process starts now."""
        return State("running", now(), process=os.getpid(), host=platform.node())

    def end(self, status: Status, reason: str, last_step: int | None) -> State:
        """The state when the process is done with it."""
        reason = reason[:_MOST_REASON]
        return replace(self, status=status, reason=reason, ended=now(), last_step=last_step)

    def write(self, folder: Path) -> None:
        """Keep the state in the run's folder; raises OSError."""
        replace_text(folder / STATE_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> State | None:
        """The state that a folder holds; None for a run that nobody started as one.

        A run that is said to be running by a process that is gone is "crashed". Raises ValueError
        for a damaged file, and OSError for one that cannot be read.
        """
        state = _read(folder / STATE_NAME)
        if state is None or state.status != "running" or _is_alive(folder, state):
            return state
        state = _read(folder / STATE_NAME)  # it may have ended since
        if state is None or state.status != "running":
            return state
        return replace(state, status="crashed", reason=_GONE)

    @staticmethod
    def told(text: bytes, path: str) -> State:
        """The state in a file of this text, far from the lock that its process holds.

        A run that is said to be running is crashed only where this machine ran it, and knows that
        the process is gone. Raises ValueError for a damaged file, naming its ``path``.
        """
        state = _parsed(text, path)
        is_here = state.host == platform.node()
        if state.status != "running" or not is_here or is_running(state.process):
            return state
        return replace(state, status="crashed", reason=_GONE)


def _read(path: Path) -> State | None:
    try:
        text = read_file(path, MOST_BYTES)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return _parsed(text, str(path))


def _parsed(text: bytes, path: str) -> State:
    try:
        found = parse_json(text)
        # Later versions may say more.
        known = {field.name for field in fields(State)} & found.keys()
        state = State(**{name: found[name] for name in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if (wrong := _wrong(state)) is not None:
        raise ValueError(f"{path} is damaged: {wrong}")
    return state


def _wrong(state: State) -> str | None:
    """What is not of the kind that it should be."""
    if state.status not in STATUSES:
        return f"the status {state.status!r:.100} is unknown"
    if not all(isinstance(getattr(state, name), str) for name in _TEXTS):
        return f"one of {', '.join(_TEXTS)} is no text"
    if type(state.process) is not int or state.process < 0:
        return "'process' is no number of a process"
    if state.last_step is not None and type(state.last_step) is not int:
        return "'last_step' is no whole number"
    return None


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def parsed_time(text: str) -> datetime | None:
    """The time that a text of `now` tells; None for another text."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


class Lock:
    """Held on a run's folder until ``release``, or until the process ends in whatever way.

    A child that is forked does not hold it. Its file also keeps some room, for what is to be said
    on a disk that is full. Raises ``BlockingIOError`` where another process, or another run of this
    one, holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._file: BinaryIO | None = None
        file = _opened(self._path)
        if fcntl is None:
            file.close()
            return
        try:
            _take(file)
        except BlockingIOError:
            file.close()
            raise
        except OSError:  # some network file systems have none
            file.close()
            return
        self._file = file
        self._links = os.fstat(file.fileno()).st_nlink  # some file systems count none
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _close_copy(reference))
        with suppress(OSError):  # a disk that is full already
            file.truncate(0)
            file.write(bytes(_ROOM))

    @property
    def is_held(self) -> bool:
        """Whether it keeps others out: not where there are no locks, nor once it is released."""
        return self._file is not None

    @property
    def is_in_place(self) -> bool:
        """Whether the folder is still the one that it was taken on: neither deleted nor moved."""
        if not self._path.exists():
            return False
        if self._file is None:
            return True
        links = os.fstat(self._file.fileno()).st_nlink
        return links > 0 or links == self._links

    def give_room(self) -> None:
        """Give up the room that the file keeps; raises OSError."""
        if self._file is not None:
            os.ftruncate(self._file.fileno(), 0)

    def release(self) -> None:
        """Hold it no longer."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _opened(path: Path) -> BinaryIO:
    """The file to lock. A link is not followed, nor a FIFO waited for: raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no file", str(path))
    return file


def _take(file: BinaryIO) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # Readers who ask whether it is held share it for a moment: so could we, then.
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            fcntl.flock(file, fcntl.LOCK_UN)
            time.sleep(0.001)
        else:
            return


def _close_copy(reference: weakref.ref[Lock]) -> None:
    if (lock := reference()) is not None:
        lock.release()  # of the child's own descriptor: the parent's keeps the lock


def _is_alive(folder: Path, state: State) -> bool:
    if fcntl is not None:
        try:
            with open(open_file(folder / LOCK_NAME), "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (OSError, ValueError):
            pass  # there is none, or it cannot be tried here
        else:
            return False
    return state.host != platform.node() or is_running(state.process)


def is_running(process: int) -> bool:
    """Whether this machine runs a process of that number."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # more than any process has
        return False
    except OSError:
        return True
    return process > 0
