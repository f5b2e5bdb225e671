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
from tmm.core.metrics import FloatArray
from tmm.core.records import StepArray
from tmm.views.live.held_run import Extent, HeldRun

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
        self._gate = _Gate()
        self._awake = threading.Event()
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
        # of HDF5, and has nothing of it to close: an ending interpreter takes HDF5's lock.
        self._gate.close()
        self._awake.set()

    def _run(self) -> None:
        while not self._gate.is_closed:
            try:
                run = _StoppableRun(self._path, self._gate)
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


class _Gate:
    """What a thread passes for each look at files, until it is closed by another thread."""

    def __init__(self) -> None:
        self.is_closed = False
        self._turn = threading.Lock()  # held while files are read
        self._run: _StoppableRun | None = None  # whose files may be open

    def passed(self, run: _StoppableRun, read: Callable[[], _Result]) -> _Result:
        """What ``read`` returns; raises `_Stopped` once the gate is closed."""
        with self._turn:
            if self.is_closed:
                raise _Stopped
            self._run = run
            return read()

    def close(self) -> None:
        """Let nothing pass any more, and close the files here: the thread would do it anytime."""
        with self._turn:
            self.is_closed = True
            if self._run is not None:
                HeldRun.close(self._run)

    def close_files(self) -> None:
        """Close the files for the thread that reads them; it is too late if the gate is closed."""
        with self._turn:
            if self._run is not None and not self.is_closed:
                HeldRun.close(self._run)


class _StoppableRun(HeldRun):
    """A run of which nothing is read any more once its gate is closed."""

    def __init__(self, path: Path, gate: _Gate) -> None:
        self._gate = gate
        super().__init__(path)

    def catch_up(self) -> Extent:
        return self._gate.passed(self, super().catch_up)

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        return self._gate.passed(self, lambda: super(_StoppableRun, self).series(key))

    def close(self) -> None:
        self._gate.close_files()


def _guarded(name: str, detector: Detector, failures: list[str]) -> Detector:
    """The detector, whose failure is noted rather than printed into a screen."""

    def detect(recorded: Any) -> Iterator[Anomaly]:
        try:
            yield from detector(recorded)
        except Exception as error:  # any code may be behind it
            failures.append(f"{name}: {type(error).__name__}: {error}")

    return detect
