"""What is shown of a run at one moment."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tmm.analysis.anomaly import Severity
from tmm.core.records import Event, KeyInfo
from tmm.runtime.store.segment_layout import segment_paths
from tmm.views.live.choice import choose_keys
from tmm.views.live.held_run import HeldRun
from tmm.views.live.judge import Findings
from tmm.views.live.rates import RATE_KEYS, Sightings, recorded_rates
from tmm.views.live.series_cache import KnownSeries, SeriesCache
from tmm.views.live.standing import Standing, standing


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
