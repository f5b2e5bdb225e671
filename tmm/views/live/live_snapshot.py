"""What is shown of a run at one moment, and whether it still goes on."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tmm.analysis.anomaly import Severity
from tmm.core.records import Event, KeyInfo
from tmm.runs.state import State, is_running, parsed_time
from tmm.runtime.store.segment_layout import segment_paths
from tmm.views.live.choice import choose_keys
from tmm.views.live.held_run import HeldRun, KnownSeries, SeriesCache
from tmm.views.live.judge import Findings
from tmm.views.live.rates import RATE_KEYS, Sightings, recorded_rates


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    ``status`` is one of ``tmm.runs.state.STATUSES``; of a run that ``tmm.start_run`` did not start,
    and which therefore says nothing of itself, whether its process is "alive", "gone" or, on
    another machine, "unknown". ``seconds`` is how long it has taken since its last start; None
    where that is not known. ``is_over`` tells that nobody records it any more.
    """

    status: str
    reason: str
    seconds: float | None
    is_over: bool


@dataclass(frozen=True, eq=False)
class Line:
    """A key and what is known of it; ``severity`` is that of its worst anomaly."""

    key: str
    series: KnownSeries
    severity: Severity | None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A run at one moment.

    ``steps`` is the number of recorded steps and ``last_step`` the newest one, recorded
    ``silent_seconds`` ago. ``rates`` holds what is processed in a second, ``{"steps": 1.5}``, while
    the run goes on. ``keys`` is the number of keys, of which ``lines`` shows some; ``event`` is the
    newest one.
    """

    id: str
    name: str
    standing: Standing
    steps: int
    last_step: int | None
    silent_seconds: float | None
    rates: Mapping[str, float]
    keys: int
    lines: tuple[Line, ...]
    findings: Findings
    event: Event | None


class Follower:
    """Takes snapshots of the run in a folder; reads only what they show, and of that what is new.

    ``patterns`` are regular expressions (`re.match`): with some, only keys that one of them matches
    are shown, in the order of execution. Raises OSError and ValueError as ``tmm.open_run`` does.
    """

    def __init__(self, path: Path, patterns: Sequence[str] = ()) -> None:
        self.run = HeldRun(path)
        self._patterns = tuple(patterns)
        self._infos: tuple[KeyInfo, ...] = ()
        self._choice: tuple[int, Findings, list[str]] | None = None
        self._cache = SeriesCache(self.run)
        self._sightings = Sightings()

    def snapshot(self, lines: int, findings: Findings) -> Snapshot:
        """The run now, with ``lines`` keys at most; raises OSError and ValueError.

        ``findings`` are shown as they are, and decide which keys come first.
        """
        run = self.run
        info = run.info
        stands = standing(run.path, info)  # before the values: those of an ended run are final
        extent = run.catch_up()
        keys = run.keys()
        if len(keys) != len(self._infos):
            self._infos = tuple(run.key_info(key) for key in keys)
            self._choice = None
        if self._choice is None or self._choice[:2] != (lines, findings):
            self._choice = lines, findings, self._chosen(lines, findings)
        shown = self._choice[2]
        there = set(keys)
        for_rates = [key for key in RATE_KEYS if key in there]
        series = self._cache.read(list(dict.fromkeys([*shown, *for_rates])))
        events = run.events
        last = int(run.steps[-1]) if extent.steps else None
        severities: dict[str, Severity] = {}
        for anomaly in findings.anomalies:  # the worst first
            severities.setdefault(anomaly.key, anomaly.severity)
        return Snapshot(
            id=str(info.get("id", run.path.name)),
            name=str(info.get("name", run.path.name)),
            standing=stands,
            steps=extent.steps,
            last_step=last,
            silent_seconds=None if last is None else _silent_seconds(run.path),
            rates={} if stands.is_over else self._rates(series, last),
            keys=len(keys),
            lines=tuple(Line(key, series[key], severities.get(key)) for key in shown),
            findings=findings,
            event=events[-1] if events else None,
        )

    def _chosen(self, lines: int, findings: Findings) -> list[str]:
        if not self._patterns:
            return choose_keys(self._infos, lines, (a.key for a in findings.anomalies))
        matched = {key for pattern in self._patterns for key in self.run.keys(pattern)}
        return [info.key for info in self._infos if info.key in matched][:lines]

    def _rates(self, series: Mapping[str, KnownSeries], last: int | None) -> dict[str, float]:
        if last is not None:
            self._sightings.see(last)
        rates = recorded_rates(series)
        seen = self._sightings.steps_per_second()
        return rates if seen is None or "steps" in rates else {"steps": seen, **rates}


def _silent_seconds(path: Path) -> float | None:
    segments = segment_paths(path)
    return max(0.0, time.time() - segments[-1].stat().st_mtime) if segments else None


def standing(path: Path, info: Mapping[str, Any]) -> Standing:
    """How the run in the folder ``path`` stands; ``info`` is its ``run.json``.

    Raises ValueError where what it says of itself is damaged.
    """
    state = State.read(path)
    if state is not None and state.status == "crashed":
        # It may have ended between the look at its file and that at its lock, in this order.
        state = State.read(path)
    if state is None:
        return _of_process(info)
    end = parsed_time(state.ended) if state.ended else datetime.now(UTC)
    start = parsed_time(state.started)
    known = state.status != "crashed" and start is not None and end is not None
    seconds = (end - start).total_seconds() if known and start and end else None
    return Standing(state.status, state.reason, seconds, state.status != "running")


def _of_process(info: Mapping[str, Any]) -> Standing:
    last = (info.get("starts") or [{}])[-1]
    process, start = last.get("process"), parsed_time(str(last.get("time")))
    if last.get("host") != platform.node() or type(process) is not int or process <= 0:
        return Standing("unknown", "its process is on another machine", None, False)
    if not is_running(process):
        return Standing("gone", "", None, True)
    seconds = None if start is None else (datetime.now(UTC) - start).total_seconds()
    return Standing("alive", "", seconds, False)
