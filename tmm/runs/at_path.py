"""A run at a path that somebody gives, as ``tmm.instrument(run=path)`` records it."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Callable
from pathlib import Path

from tmm.core.metrics import HISTOGRAM_EDGES
from tmm.runs.claim import check_is_here, claim
from tmm.runs.held import HeldFolder
from tmm.runtime.store.run_writer import RunWriter
from tmm.spec.environment import describe_environment
from tmm.steps.earlier import Earlier


class PathRun:
    """A run that has no object of its own: it ends with its monitor, or with the process.

    ``writer`` records into it, as that ``rank`` where several do. ``earlier`` is what it had
    recorded before, if it goes on; ``notice`` says why it is at another path than was asked for.

    Raises:
        ValueError: for what is not a run's, and for a run to resume that is running.
        OSError: if the folder cannot be written, or is a file.
    """

    def __init__(self, path: Path, *, resume: bool, rank: int | None = None) -> None:
        check_is_here(path, "run")
        claimed = claim(path.absolute(), resume=resume)  # the program may go to another folder
        self.notice = claimed.notice
        self._close_at_exit = AtExit()
        held = HeldFolder(claimed.path, claimed.lock)
        try:
            self.earlier = Earlier.of(claimed.path) if claimed.resumes else None
            self.writer = RunWriter(
                claimed.path,
                info=describe_environment(),
                histogram_edges=HISTOGRAM_EDGES,
                started=self._close_at_exit.register,
                ended=held.recording_ended,
                rank=rank,
            )
            held.begin()
        except BaseException:
            held.give_up()
            raise

    def close_at_exit(self, close: Callable[[], None]) -> None:
        """Let the method ``close`` end the run when the process ends, unless it did before.

        It does not keep its object alive.
        """
        self._close_at_exit.call(close)

    def give_up(self) -> None:
        """End the run, which nothing will be recorded into."""
        self.writer.close()


class AtExit:
    """Calls a method when the interpreter exits, if its object is still there."""

    def __init__(self) -> None:
        self._method: weakref.WeakMethod[Callable[[], None]] | None = None

    def call(self, method: Callable[[], None]) -> None:
        """Call this one, and none that was given before."""
        self._method = weakref.WeakMethod(method, lambda _: atexit.unregister(self._run))
        self.register()

    def register(self) -> None:
        """Again where others have registered since: handlers run last in, first out."""
        atexit.unregister(self._run)
        if self._method is not None:
            atexit.register(self._run)

    def _run(self) -> None:
        method = None if self._method is None else self._method()
        if method is not None:
            method()
