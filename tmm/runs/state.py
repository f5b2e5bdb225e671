"""What became of a run: kept in its folder, and by a lock that only a living process holds."""

from __future__ import annotations

import json
import os
import platform
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal, TypeAlias, get_args

from tmm.runtime.replacing import replace_text

try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None  # type: ignore[assignment]

STATE_NAME = "state.json"
LOCK_NAME = "alive.lock"
_ROOM = 4096  # bytes; a block of most file systems

Status: TypeAlias = Literal["running", "finished", "failed", "stopped", "crashed", "broken"]
STATUSES: tuple[Status, ...] = get_args(Status)


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
        return replace(self, status=status, reason=reason, ended=now(), last_step=last_step)

    def write(self, folder: Path) -> None:
        """Keep the state in the run's folder; raises OSError."""
        replace_text(folder / STATE_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> State | None:
        """The state that a folder holds; None for a run that nobody started as one.

        A run that is said to be running by a process that is gone is "crashed". Raises ValueError
        for a damaged file.
        """
        state = _read(folder / STATE_NAME)
        if state is None or state.status != "running" or _is_alive(folder, state):
            return state
        state = _read(folder / STATE_NAME)  # it may have ended since
        if state is None or state.status != "running":
            return state
        return replace(state, status="crashed", reason="its process is gone")


def _read(path: Path) -> State | None:
    try:
        found = json.loads(path.read_bytes())
        # Later versions may say more.
        known = {field.name for field in fields(State)} & found.keys()
        state = State(**{name: found[name] for name in known})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if state.status not in STATUSES:
        raise ValueError(f"{path} is damaged: the status {state.status!r} is unknown")
    return state


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class Lock:
    """Held on a run's folder until ``release``, or until the process ends in whatever way.

    A child that is forked does not hold it. Its file also keeps some room, for what is to be said
    on a disk that is full. Raises ``BlockingIOError`` where another process, or another run of this
    one, holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_NAME
        self._file: BinaryIO | None = None
        file = self._path.open("ab", buffering=0)  # whoever holds it is to keep its room
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
    path = folder / LOCK_NAME
    if fcntl is not None and path.exists():
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass  # it cannot be tried here
        else:
            return False
    return state.host != platform.node() or _is_running(state.process)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
