"""What goes wrong is said at the step where it happens, by the detectors of ``tmm anomalies``."""

from __future__ import annotations

import warnings
from functools import partial

import numpy as np

from tmm.analysis.anomaly import SEVERITIES, Anomaly, Severity
from tmm.analysis.detectors.nonfinite_values import nonfinite, nonfinite_at
from tmm.analysis.recent import RecentSeries
from tmm.analysis.registry import (
    ENDINGS,
    JOINT_ENDINGS,
    Detector,
    find_anomalies,
    found_by,
    in_order,
)
from tmm.analysis.story import Draft, in_causal_order, link
from tmm.core.failures import levels_to_user
from tmm.core.records import Event, StepRecord, Table
from tmm.runtime.store.run_reader import RunReader
from tmm.spec.alert_settings import AlertSettings

_SPREADS = "nonfinite"  # from tensor to tensor, which is no news
_TOLD = 5  # stories in one message
_ALL_ENDINGS = {**ENDINGS, **JOINT_ENDINGS}
_KEPT = 20  # events of one step
_REMEMBERED = 100  # stories that may explain what comes later


class AlertWarning(UserWarning):
    """Something in the training has gone wrong."""


class AlertError(RuntimeError):
    """Something in the training has gone wrong; the step is recorded.

    Attributes:
        step: the step.
        anomalies: what was found in it: the cause first, with what it explains.
    """

    def __init__(self, step: int, stories: tuple[Draft, ...]) -> None:
        super().__init__(_message(step, stories))
        self.step, self.anomalies = step, _anomalies_of(stories)


class Alerts:
    """Looks at each recorded step, and remembers what was said already."""

    def __init__(self, settings: AlertSettings) -> None:
        self.settings = settings
        self._recent = RecentSeries()
        self._active: set[tuple[str, str]] = set()
        self._seen: dict[tuple[str, str], int] = {}
        self._stories: list[Draft] = []

    def recall(self, run: RunReader) -> None:
        """Take the steps of ``run``, so that a training that goes on is judged as one."""
        records = [_record(run, step) for step in RecentSeries.remembered(run.steps)]
        for record in records[:-1]:
            self._recent.add(record)
        for record in records[-1:]:
            self.begun(record.step, self.look_at(record))

    def look_at(self, record: StepRecord) -> tuple[Anomaly, ...]:
        """What begins in a step, the worst first: each episode is found once."""
        self._recent.add(record)
        step = record.step
        found: list[Anomaly] = []
        lasting: set[tuple[str, str]] = set()
        for name, detector in self.settings.detectors:
            if detector is nonfinite:
                anomalies, keys = self._nonfinite(name, step)
                lasting |= {(_SPREADS, key) for key in keys}
            elif detector in _ALL_ENDINGS:
                anomalies = self._ending(name, detector, lasting)
            else:
                anomalies = list(find_anomalies(self._recent, [(name, detector)]))
            found += (anomaly for anomaly in anomalies if anomaly.last_step == step)
        return self._heard(step, in_order(found, self._recent.keys()), lasting)

    def _heard(
        self, step: int, found: tuple[Anomaly, ...], lasting: set[tuple[str, str]]
    ) -> tuple[Anomaly, ...]:
        """What is new of what was found in a step, where ``lasting`` episodes go on."""
        heard = {
            (anomaly.kind, anomaly.key): anomaly
            for anomaly in reversed(found)
            if self._counts(anomaly.severity)
        }
        new = tuple(
            anomaly
            for anomaly in found
            if heard.get((anomaly.kind, anomaly.key)) is anomaly and self._is_new(anomaly)
        )
        measured = set(self._recent.keys())
        now = heard.keys() | lasting
        self._active = {known for known in self._active if known[1] not in measured} | now
        self._seen |= dict.fromkeys(now, step)
        return new

    def _nonfinite(self, name: str, step: int) -> tuple[list[Anomaly], frozenset[str]]:
        """NaN and infinity in the step: what there is to tell, or the keys where it goes on."""
        if self.settings.least == "low":  # of what is harmless, too
            whole = partial(nonfinite, since=step)
            return found_by(name, whole, self._recent), frozenset()
        goes_on = any(kind == _SPREADS for kind, _ in self._active)
        found, keys = nonfinite_at(self._recent, step, anew=not goes_on)
        return list(found), keys if goes_on else frozenset()

    def _ending(
        self, name: str, detector: Detector, lasting: set[tuple[str, str]]
    ) -> list[Anomaly]:
        """What ends with the newest values; episodes that were told and go on are ``lasting``."""
        asked: set[str] = set()
        for end in _ALL_ENDINGS[detector]:
            if not self._counts(end.worst):
                continue
            newest = self._recent.newest(end.chooses)
            ending = end.ending(newest)
            groups = set()
            for place in np.flatnonzero(ending.possible):
                info = newest.info(int(place))
                if ending.sure[place] and (end.kind, info.key) in self._active:
                    lasting.add((end.kind, info.key))
                    continue
                asked.add(info.key)
                groups.add(info.key if end.group is None else end.group(info))
            if end.group is not None and groups:
                infos = map(newest.info, range(len(newest)))
                asked.update(info.key for info in infos if end.group(info) in groups)
            if end.reads is not None and groups:
                asked.update(self._recent.chosen(end.reads))
        return found_by(name, detector, self._recent.part(frozenset(asked))) if asked else []

    def begun(self, step: int, found: tuple[Anomaly, ...]) -> tuple[Draft, ...]:
        """The stories that begin with what was ``found`` in a step.

        What an earlier story explains, which began or went on in the last steps, is a part of it.
        """
        lasting = self._active - {(anomaly.kind, anomaly.key) for anomaly in found}
        for story in self._stories:
            members = (story.cause, *story.consequences)
            if any((member.kind, member.key) in lasting for member in members):
                story.until = step
        known = len(self._stories)
        for anomaly in in_causal_order(found, self._recent.ranks):
            link(anomaly, self._stories, self._recent)
        begun = tuple(self._stories[known:])
        del self._stories[:-_REMEMBERED]
        return begun

    def _counts(self, severity: Severity) -> bool:
        return SEVERITIES.index(severity) >= SEVERITIES.index(self.settings.least)

    def events(self, step: int, anomalies: tuple[Anomaly, ...]) -> tuple[Event, ...]:
        """What the run keeps of what was found in a step."""
        kept = anomalies[:_KEPT]
        return tuple(Event(step, "alert", f"{one.severity}: {one.text}") for one in kept)

    def act(self, step: int, stories: tuple[Draft, ...]) -> None:
        """Do what the spec says about stories that begin; nothing where none does.

        Raises:
            AlertError: if it says "raise".
        """
        action = self.settings.action
        if not stories:
            return
        if callable(action):
            action(_anomalies_of(stories))
        elif action == "raise":
            raise AlertError(step, stories)
        else:
            warnings.warn(_message(step, stories), AlertWarning, stacklevel=levels_to_user())

    def _is_new(self, anomaly: Anomaly) -> bool:
        """Whether its episode was not heard of: one that pauses is found with its first step."""
        known = (anomaly.kind, anomaly.key)
        if anomaly.kind == _SPREADS:
            return not any(kind == _SPREADS for kind, _ in self._active)
        return known not in self._active and anomaly.step > self._seen.get(known, anomaly.step - 1)


def _record(run: RunReader, step: int) -> StepRecord:
    numbers = {key: value for key, value in run.at(step).items() if np.ndim(value) == 0}
    infos = tuple(map(run.key_info, numbers))
    return StepRecord(step, (Table(infos, np.array(list(numbers.values()), dtype=np.float64)),))


def _anomalies_of(stories: tuple[Draft, ...]) -> tuple[Anomaly, ...]:
    return tuple(a for story in stories for a in (story.cause, *story.consequences))


def _message(step: int, stories: tuple[Draft, ...]) -> str:
    """The causes, the worst first, what each explains in this step, and what to try."""
    ordered = sorted(stories, key=lambda story: -SEVERITIES.index(story.story().severity))
    lines = []
    for draft in ordered[:_TOLD]:
        story = draft.story()
        advice = f" Try: {story.advice}." if story.advice else ""
        lines.append(f"{story.text}{advice}")
    if len(stories) > _TOLD:
        lines.append(f"and {len(stories) - _TOLD} more")
    return f"step {step}: " + "\n  ".join(lines)
