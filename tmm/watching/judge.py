"""Asks the detectors of ``tmm anomalies`` beside a screen that stays alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tmm.analysis.anomaly import Anomaly
from tmm.analysis.registry import Detector, find_anomalies
from tmm.metrics import FloatArray
from tmm.reader import StepArray
from tmm.watching.held_run import Extent, HeldRun

_SHARE = 0.1  # of the time, at most, goes into looking for anomalies

_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class Findings:
    """What the detectors found, the worst first, in a run of that ``extent``.

    ``last_step`` is the newest step that they saw, None where there was none; ``failures`` says
    which detectors failed.
    """

    anomalies: tuple[Anomaly, ...] = ()
    last_step: int | None = None
    extent: Extent | None = None
    failures: tuple[str, ...] = ()


def judged(run: HeldRun, detectors: tuple[tuple[str, Detector], ...]) -> Findings:
    """What all ``detectors`` find in ``run`` as it is now."""
    failures: list[str] = []
    guarded = [(name, _guarded(name, detector, failures)) for name, detector in detectors]
    extent, steps = run.extent, run.steps
    anomalies = find_anomalies(run, guarded)
    return Findings(anomalies, int(steps[-1]) if len(steps) else None, extent, tuple(failures))


class Judge:
    """A thread that judges a run again whenever it has grown; use it in a ``with`` block.

    It has a reader of its own, works a tenth of the time at most, and `findings` never waits.
    """

    def __init__(self, path: Path, detectors: tuple[tuple[str, Detector], ...]) -> None:
        self.findings = Findings()
        self._path, self._detectors = path, detectors
        self._turn = threading.Lock()  # held while files are read
        self._stopped, self._awake = threading.Event(), threading.Event()
        self._hurry = False
        self._thread = threading.Thread(target=self._run, name="tmm watch", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def hurry(self) -> None:
        """Do not pause any more: the run has ended."""
        self._hurry = True
        self._awake.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The thread may compute for seconds. It need not be waited for, if only it is not inside
        # of HDF5, whose lock an ending interpreter takes.
        self._stopped.set()
        self._awake.set()
        with self._turn:
            pass

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                run = _StoppableRun(self._path, self._turn, self._stopped)
                with closing(run):
                    while True:
                        self._pause(self._look(run))
            except (OSError, ValueError):
                self._pause(1.0)  # whoever shows the run meets the error, too, and says so
            except _Stopped:
                return

    def _pause(self, seconds: float) -> None:
        self._awake.wait(seconds)
        self._awake.clear()

    def _look(self, run: HeldRun) -> float:
        """Judge the run, if there is more of it; return how long to pause, in seconds."""
        began = time.monotonic()
        if run.catch_up() != self.findings.extent:
            self.findings = judged(run, self._detectors)
        pause = (time.monotonic() - began) * (1 - _SHARE) / _SHARE
        return min(pause, 0.1) if self._hurry else max(pause, 0.5)


class _Stopped(BaseException):
    """Nobody wants to know any more; no error, and none that a detector may catch."""


@dataclass(eq=False)
class _Gate:
    turn: threading.Lock
    stopped: threading.Event

    def passed(self, read: Callable[[], _Result]) -> _Result:
        with self.turn:
            if self.stopped.is_set():
                raise _Stopped
            return read()


class _StoppableRun(HeldRun):
    """A run of which nothing is read any more once it is stopped."""

    def __init__(self, path: Path, turn: threading.Lock, stopped: threading.Event) -> None:
        self._gate = _Gate(turn, stopped)
        super().__init__(path)

    def catch_up(self) -> Extent:
        return self._gate.passed(super().catch_up)

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        return self._gate.passed(lambda: super(_StoppableRun, self).series(key))

    def close(self) -> None:
        with self._gate.turn:
            super().close()


def _guarded(name: str, detector: Detector, failures: list[str]) -> Detector:
    """The detector, whose failure is noted rather than printed into a screen."""

    def detect(recorded: Any) -> Iterator[Anomaly]:
        try:
            yield from detector(recorded)
        except Exception as error:  # any code may be behind it
            failures.append(f"{name}: {type(error).__name__}: {error}")

    return detect
