"""The screen of ``tmm watch``: frames, from the first to the last, and what a user presses."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import typer
from rich.console import Console
from rich.live import Live

from tmm.analysis.registry import all_detectors
from tmm.cli.output import fail
from tmm.cli.watch_frame import draw, lines_for_keys
from tmm.runtime.store.run_file import INFO_NAME
from tmm.views.live.judge import Findings, Judge
from tmm.views.live.live_snapshot import Follower, Snapshot

_SHARE = 0.1  # of the time, at most, goes into reading and drawing
_FINAL_SECONDS = 10.0  # for the last look at anomalies, once the run has ended
_NICE = 10


class Screen:
    """The terminal, from the first frame to the last one, which stays."""

    def __init__(self, follower: Follower, console: Console, every: float) -> None:
        self._follower, self._console, self._every = follower, console, every
        self._snapshot: Snapshot | None = None
        self._signal: int | None = None
        self._awake = threading.Event()

    def show(self) -> None:
        """Show the run until it has ended, is deleted, or somebody leaves."""
        detectors = all_detectors()  # those that cannot be loaded are warned of before the screen
        with suppress(OSError, AttributeError):  # not a Unix
            os.nice(_NICE)  # the training comes first
        error: Exception | None = None
        live = Live(console=self._console, screen=True, auto_refresh=False)
        with self._signals(), Judge(self._follower.run.path, detectors) as judge, live:
            error = self._loop(live, judge)
        if self._snapshot is not None:
            height = self._console.height - 1
            self._console.print(draw(self._snapshot, self._console.width, height))
        if error is not None:
            path = self._follower.run.path
            gone = not (path / INFO_NAME).exists()
            fail(f"the run {path.name} was deleted" if gone else str(error))
        if self._signal is not None:
            raise typer.Exit(128 + self._signal)

    def _loop(self, live: Live, judge: Judge) -> Exception | None:
        ended: float | None = None
        failures = 0
        while self._signal is None:
            began = time.monotonic()
            try:
                self._snapshot = snapshot = self._take(judge.findings)
            except (OSError, ValueError) as error:  # maybe in the midst of being replaced
                failures += 1
                if failures == 2:
                    return error
                self._pause(self._every)
                continue
            failures = 0
            width, height = self._console.size
            live.update(draw(snapshot, width, height), refresh=True)
            spent = time.monotonic() - began
            if not snapshot.standing.is_over:
                self._pause(max(self._every, spent * (1 - _SHARE) / _SHARE))
                continue
            ended = ended or began
            is_final = snapshot.findings.extent == self._follower.run.extent
            if is_final or began - ended > _FINAL_SECONDS:
                return None
            judge.hurry()
            self._pause(0.1)
        return None

    def _pause(self, seconds: float) -> None:
        self._awake.wait(seconds)
        self._awake.clear()  # here, because a signal that comes later is seen before the next pause

    def _take(self, findings: Findings) -> Snapshot:
        lines = lines_for_keys(self._console.height, len(findings.stories))
        return self._follower.snapshot(lines, findings)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Note signals instead of raising where a file is read or a frame is half drawn."""

        def leave(number: int, _: FrameType | None) -> None:
            self._signal = number
            self._awake.set()
            signal.signal(number, before[number])  # a second one works as ever

        def redraw(number: int, _: FrameType | None) -> None:
            self._awake.set()

        handlers = {signal.SIGINT: leave, signal.SIGTERM: leave}
        if hasattr(signal, "SIGWINCH"):
            handlers[signal.SIGWINCH] = redraw
        before: dict[int, Any] = {
            number: signal.signal(number, handlers[number]) for number in handlers
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
