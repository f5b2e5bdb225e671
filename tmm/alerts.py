"""What goes wrong is said at the step where it happens, by the detectors of ``tmm anomalies``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias, get_args

import numpy as np

from tmm.analysis.anomaly import SEVERITIES, Anomaly, Severity
from tmm.analysis.detectors.nonfinite import nonfinite
from tmm.analysis.recent import RecentSeries
from tmm.analysis.registry import Detector, all_detectors, find_anomalies
from tmm.layout import Event, StepRecord, Table
from tmm.reader import Run

Alarms: TypeAlias = bool | Severity | Iterable[str | Detector]
OnAlert: TypeAlias = Literal["warn", "raise"] | Callable[[tuple[Anomaly, ...]], object]

_LEAST: Severity = "medium"
_SPREADS = "nonfinite"  # from tensor to tensor, which is no news
_TOLD = 5  # anomalies in one message
_KEPT = 20  # events of one step


class AlertWarning(UserWarning):
    """Something in the training has gone wrong."""


class AlertError(RuntimeError):
    """Something in the training has gone wrong; the step is recorded.

    Attributes:
        step: the step.
        anomalies: what was found in it, the worst first.
    """

    def __init__(self, step: int, anomalies: tuple[Anomaly, ...]) -> None:
        super().__init__(_message(step, anomalies))
        self.step, self.anomalies = step, anomalies


@dataclass(frozen=True)
class AlertSettings:
    """Which detectors look at each step, the least severity that counts, and what is done."""

    detectors: tuple[tuple[str, Detector], ...]
    least: Severity
    action: OnAlert

    def __str__(self) -> str:
        names = [name for name, _ in self.detectors]
        action = "<function>" if callable(self.action) else repr(self.action)
        return f"alerts={names}, on_alert={action}"

    @classmethod
    def build(cls, alerts: Alarms, on_alert: OnAlert) -> AlertSettings | None:
        """What ``alerts=`` and ``on_alert=`` of a spec mean; None for no alerts.

        Raises:
            ValueError: for a detector or a severity that does not exist, or no detectors.
            TypeError: for what is none of them, or an ``on_alert`` that cannot be done.
        """
        if on_alert not in ("warn", "raise") and not callable(on_alert):
            raise TypeError(f"on_alert={on_alert!r} is neither 'warn', 'raise' nor a function")
        if isinstance(alerts, bool):
            return cls(all_detectors(), _LEAST, on_alert) if alerts else None
        if isinstance(alerts, str):
            if alerts not in SEVERITIES:
                raise ValueError(
                    f"alerts={alerts!r} is no severity ({', '.join(get_args(Severity))}); give"
                    " detectors as a list"
                )
            return cls(all_detectors(), alerts, on_alert)
        if not isinstance(alerts, Iterable):
            raise TypeError(
                f"alerts={alerts!r} is neither True, a severity nor a list of detectors"
            )
        chosen = tuple(map(_detector, alerts))
        if not chosen:
            raise ValueError("alerts=[] has no detectors; give True for all, False for none")
        return cls(chosen, _LEAST, on_alert)


class Alerts:
    """Looks at each recorded step, and remembers what was said already."""

    def __init__(self, settings: AlertSettings) -> None:
        self.settings = settings
        self._recent = RecentSeries()
        self._active: set[tuple[str, str]] = set()
        self._seen: dict[tuple[str, str], int] = {}

    def recall(self, run: Run) -> None:
        """Take the steps of ``run``, so that a training that goes on is judged as one."""
        records = [_record(run, step) for step in RecentSeries.remembered(run.steps)]
        for record in records[:-1]:
            self._recent.add(record)
        for record in records[-1:]:
            self.look_at(record)

    def look_at(self, record: StepRecord) -> tuple[Anomaly, ...]:
        """What begins in a step, the worst first: each episode is found once."""
        self._recent.add(record)
        step = record.step
        detectors = [(name, _of_step(detector, step)) for name, detector in self.settings.detectors]
        found = find_anomalies(self._recent, detectors)
        least = SEVERITIES.index(self.settings.least)
        heard = {
            (anomaly.kind, anomaly.key): anomaly
            for anomaly in reversed(found)
            if anomaly.last_step == step and SEVERITIES.index(anomaly.severity) >= least
        }
        new = tuple(
            anomaly
            for anomaly in found
            if heard.get((anomaly.kind, anomaly.key)) is anomaly and self._is_new(anomaly)
        )
        measured = set(self._recent.keys())
        self._active = {known for known in self._active if known[1] not in measured} | heard.keys()
        self._seen |= dict.fromkeys(heard, step)
        return new

    def act(self, step: int, anomalies: tuple[Anomaly, ...]) -> None:
        """Do what the spec says about what was found.

        Raises:
            AlertError: if it says "raise".
        """
        action = self.settings.action
        if callable(action):
            action(anomalies)
        elif action == "raise":
            raise AlertError(step, anomalies)
        else:
            warnings.warn(_message(step, anomalies), AlertWarning, stacklevel=4)

    def _is_new(self, anomaly: Anomaly) -> bool:
        """Whether its episode was not heard of: one that pauses is found with its first step."""
        known = (anomaly.kind, anomaly.key)
        if anomaly.kind == _SPREADS:
            return not any(kind == _SPREADS for kind, _ in self._active)
        return known not in self._active and anomaly.step > self._seen.get(known, anomaly.step - 1)


def alert_events(step: int, anomalies: tuple[Anomaly, ...]) -> tuple[Event, ...]:
    """What the run keeps of it."""
    return tuple(
        Event(step, "alert", f"{anomaly.severity}: {anomaly.text}") for anomaly in anomalies[:_KEPT]
    )


def _record(run: Run, step: int) -> StepRecord:
    numbers = {key: value for key, value in run.at(step).items() if np.ndim(value) == 0}
    infos = tuple(map(run.key_info, numbers))
    return StepRecord(step, (Table(infos, np.array(list(numbers.values()), dtype=np.float64)),))


def _detector(chosen: str | Detector) -> tuple[str, Detector]:
    if callable(chosen):
        return getattr(chosen, "__name__", type(chosen).__name__), chosen
    known = dict(all_detectors())
    if chosen not in known:
        raise ValueError(f"alerts: no detector {chosen!r}; there are {', '.join(known)}")
    return chosen, known[chosen]


def _of_step(detector: Detector, step: int) -> Detector:
    # Its episodes would be the first ones of the record: those of this step are asked for.
    return partial(nonfinite, since=step) if detector is nonfinite else detector


def _message(step: int, anomalies: tuple[Anomaly, ...]) -> str:
    lines = [f"step {step}: {anomalies[0].text}"]
    lines += [f"  {anomaly.text}" for anomaly in anomalies[1:_TOLD]]
    if len(anomalies) > _TOLD:
        lines.append(f"  and {len(anomalies) - _TOLD} more")
    return "\n".join(lines)
