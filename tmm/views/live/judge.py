"""Asks the detectors of ``tmm anomalies`` beside a screen that stays alive."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tmm.analysis.anomaly import Anomaly
from tmm.analysis.registry import Detector
from tmm.analysis.story import Story, anomalies_of, find_stories
from tmm.views.live.held_run import Extent, HeldRun

_SHARE = 0.1  # of the time, at most, goes into looking for anomalies


@dataclass(frozen=True, eq=False)
class Findings:
    """What the detectors found, the worst first, and its stories, in a run of that ``extent``.

    ``last_step`` is the newest step that they saw, None where there was none; ``failures`` says
    which detectors failed.
    """

    anomalies: tuple[Anomaly, ...] = ()
    stories: tuple[Story, ...] = ()
    last_step: int | None = None
    extent: Extent | None = None
    failures: tuple[str, ...] = ()


def judged(run: HeldRun, detectors: tuple[tuple[str, Detector], ...]) -> Findings:
    """What all ``detectors`` find in ``run`` as it is now."""
    failures: list[str] = []
    guarded = [(name, _guarded(name, detector, failures)) for name, detector in detectors]
    extent, steps = run.extent, run.steps
    stories = find_stories(run, guarded)
    anomalies = anomalies_of(stories, run.keys())
    return Findings(
        anomalies, stories, int(steps[-1]) if len(steps) else None, extent, tuple(failures)
    )


class Judge:
    """A thread that judges a run again whenever it has grown; use it in a ``with`` block.

    It has a reader of its own, works a tenth of the time at most, and `findings` never waits.
    """

    def __init__(self, path: Path, detectors: tuple[tuple[str, Detector], ...]) -> None:
        self.findings = Findings()
        self._path, self._detectors = path, detectors
        self._awake = threading.Event()
        self._is_left = self._hurry = False
        self._thread = threading.Thread(target=self._run, name="tmm watch", daemon=True)

    def hurry(self) -> None:
        """Do not pause any more: the run has ended."""
        self._hurry = True
        self._awake.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        # The thread may compute for seconds more. Nobody waits for it: it only reads.
        self._is_left = True
        self._awake.set()

    def _run(self) -> None:
        while not self._is_left:
            try:
                with HeldRun(self._path) as run:
                    while not self._is_left:
                        self._pause(self._look(run))
            except (OSError, ValueError):
                self._pause(1.0)  # whoever shows the run meets the error, too, and says so

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


def _guarded(name: str, detector: Detector, failures: list[str]) -> Detector:
    """The detector, whose failure is noted rather than printed into a screen."""

    def detect(recorded: Any) -> Iterator[Anomaly]:
        try:
            yield from detector(recorded)
        except Exception as error:  # any code may be behind it
            failures.append(f"{name}: {type(error).__name__}: {error}")

    return detect
