"""A run's folder while this process records into it."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

from tmm.core.failures import words
from tmm.runs.state import Lock, State, Status


class HeldFolder:
    """Says in the folder of a run that it is running, and in the end what became of it.

    ``begin`` says the one and ``end`` the other, which releases the lock, whatever happens. Without
    a lock another process keeps the run, and nothing is written.
    """

    def __init__(self, path: Path, lock: Lock | None) -> None:
        self.path = path
        self._lock = lock
        self._changing = threading.RLock()  # the thread of a writer may end the run as well
        self._state = State.begin()
        self._earlier = _uncaught(), sys.exception()

    def begin(self) -> None:
        """Say that the run is running; raises OSError."""
        if self._lock is not None:
            self._state.write(self.path)

    def give_up(self) -> None:
        """Release the lock, and leave what is said of the run as it is."""
        if self._lock is not None:
            self._lock.release()

    @property
    def status(self) -> Status:
        """What becomes of the run: "running" until it ends."""
        return self._state.status

    @property
    def process(self) -> int:
        """The process that records; a child that is forked from it is another one."""
        return self._state.process

    @property
    def is_recorded(self) -> bool:
        """Whether this process keeps the run, or kept it, rather than another one."""
        return self._lock is not None

    def uncaught(self) -> BaseException | None:
        """The exception that ends the process, if there is one."""
        error = _uncaught()
        return None if error is self._earlier[0] else error

    def end(self, status: Status, reason: str = "", last_step: int | None = None) -> None:
        """Say what became of the run; only the first call does.

        Raises:
            OSError: if it cannot be written, also because the folder is not there any more.
        """
        with self._changing:
            if self.status != "running" or self.process != os.getpid():
                return
            self._state = self._state.end(status, reason, last_step)
            if self._lock is None:
                return
            try:
                self._write_end(self._lock)
            finally:
                self._lock.release()

    def recording_failed(
        self, failure: BaseException | None, handled: BaseException | None, last_step: int | None
    ) -> None:
        """The writer of a run that ends by itself is done: nothing, unless for a ``failure``."""
        if failure is not None:
            self.end("failed", words(failure), last_step)

    def recording_ended(
        self, failure: BaseException | None, handled: BaseException | None, last_step: int | None
    ) -> None:
        """The writer of a run that has no other end is done, for a ``failure`` or as it was closed.

        ``handled`` is the exception that was being handled then.
        """
        error = failure or self.uncaught()
        if error is None and handled is not self._earlier[1]:
            error = handled
        if error is None:
            self.end("finished", "", last_step)
        else:
            self.end("failed", words(error), last_step)

    def _write_end(self, lock: Lock) -> None:
        if not lock.is_in_place:
            raise OSError(
                errno.ENOENT, f"the folder {self.path} was deleted or moved while it was recorded"
            )
        try:
            self._state.write(self.path)
        except OSError:
            lock.give_room()  # a full disk has as much as this needs, then
            self._state.write(self.path)


def _uncaught() -> BaseException | None:
    """The exception that nobody caught and that ends the process, or ended an interactive line."""
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
