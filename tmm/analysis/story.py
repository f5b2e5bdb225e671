"""Findings that belong together: a cause, and what followed from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tmm.analysis.advice import NEVER_EXPLAINED, OVERFLOWS, SELDOM_MEANT, known_of
from tmm.analysis.anomaly import SEVERITIES, Anomaly, Severity
from tmm.analysis.detectors.learning_rate import ALL
from tmm.analysis.layers import is_update, trained
from tmm.analysis.order import Rank, execution_ranks
from tmm.analysis.recorded import ReadOnce
from tmm.analysis.registry import Detector, find_anomalies, in_order
from tmm.core.families import Phase
from tmm.core.keys import is_total_loss
from tmm.core.metrics import FloatArray
from tmm.core.records import StepArray
from tmm.core.series_by_key import Recorded

_LASTS = 10  # recorded steps of the cause's key after which something new is another story
_AROUND = 5  # recorded steps before and after the onset
_LAST: Rank = (Phase.REST, 1 << 62)


@dataclass(frozen=True, eq=False)
class Excerpt:
    """A part of a series: ``steps`` and ``values`` of ``key``, both of shape (n,)."""

    key: str
    steps: StepArray
    values: FloatArray

    def told(self, onset: int) -> str:
        """The values as text, with a bar before the step at which a story begins."""
        values = [f"{value:.3g}" for value in self.values]
        place = int((self.steps < onset).sum())
        before, after = ", ".join(values[:place]), ", ".join(values[place:])
        return f"{self.key}: {f'{before} | ' if before else ''}{after}"


@dataclass(frozen=True, eq=False)
class Story:
    """What went wrong first, and what followed.

    Attributes:
        cause: the finding that came first, upstream of the others.
        consequences: the findings that it explains, by step.
        evidence: the series of the cause, and of the loss, around its first step.
        advice: what to try.
    """

    cause: Anomaly
    consequences: tuple[Anomaly, ...] = ()
    evidence: tuple[Excerpt, ...] = ()
    advice: str = ""

    @property
    def severity(self) -> Severity:
        """The worst of the cause and its consequences."""
        return max((self.cause, *self.consequences), key=_weight).severity

    @property
    def step(self) -> int:
        """The step at which it began."""
        return self.cause.step

    @property
    def last_step(self) -> int:
        """The last step of any of its findings."""
        return max(anomaly.last_step for anomaly in (self.cause, *self.consequences))

    @property
    def counts(self) -> dict[str, int]:
        """How many consequences there are of each kind, the most frequent first."""
        return dict(Counter(anomaly.kind for anomaly in self.consequences).most_common())

    @property
    def text(self) -> str:
        """What happened, in sentences: the cause, and what it brought about."""
        return self.cause.text + self.afterwards

    @property
    def afterwards(self) -> str:
        """The consequences in a sentence that begins with a space; empty without any."""
        if not self.consequences:
            return ""
        told = [f"{count} {kind.replace('_', ' ')}" for kind, count in self.counts.items()]
        return f" It explains {len(self.consequences)} more: {', '.join(told)}."

    def to_dict(self) -> dict[str, Any]:
        """The story as data: the cause's fields, then the rest; arrays are lists."""
        return {
            **vars(self.cause),
            "severity": self.severity,
            "cause_severity": self.cause.severity,
            "consequences": self.counts,
            "evidence": [
                {"key": e.key, "steps": e.steps.tolist(), "values": e.values.tolist()}
                for e in self.evidence
            ],
            "advice": self.advice,
        }


def find_stories(
    recorded: Recorded, detectors: Sequence[tuple[str, Detector]] | None = None
) -> tuple[Story, ...]:
    """What went wrong in a record: one story per cause, the gravest first, then the earliest.

    ``detectors`` are as in `find_anomalies`, whose findings are linked. Raises ``TypeError`` for
    the path of a run.
    """
    found = find_anomalies(recorded, detectors)
    return tell(found, ReadOnce(recorded)) if found else ()


def anomalies_of(stories: Iterable[Story], keys: Iterable[str]) -> tuple[Anomaly, ...]:
    """All findings of stories, as `find_anomalies` gives them."""
    return in_order((a for story in stories for a in (story.cause, *story.consequences)), keys)


def tell(found: Iterable[Anomaly], recorded: Recorded) -> tuple[Story, ...]:
    """Link what was found in a record into stories.

    Findings are taken by the step at which they begin; of one step the data come first, then what
    was done before it, the forward pass, the loss, the backward pass from the last layer on, and
    the update. A finding belongs to the first story before it that can explain it.
    """
    ranks = execution_ranks(recorded)
    drafts: list[Draft] = []
    for anomaly in in_causal_order(found, ranks):
        link(anomaly, drafts, recorded)
    stories = [draft.story(excerpts(recorded, draft.cause)) for draft in drafts]

    def standing(story: Story) -> tuple[object, ...]:
        is_minor = story.cause.kind in SELDOM_MEANT
        return -_weight_of(story.severity), is_minor, _order(story.cause, ranks)

    return tuple(sorted(stories, key=standing))


@dataclass(eq=False)
class Draft:
    """A story that may still get consequences."""

    cause: Anomaly
    patience: float
    consequences: list[Anomaly] = field(default_factory=list)
    until: int = field(init=False)

    def __post_init__(self) -> None:
        self.until = self.cause.last_step

    @classmethod
    def of(cls, cause: Anomaly, recorded: Recorded) -> Draft:
        """The story of a cause; it may explain what begins some recorded steps after its end."""
        steps, _ = recorded.series(cause.key)
        gap = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
        return cls(cause, _LASTS * gap)

    def explains(self, later: Anomaly) -> bool:
        """Whether the cause can have brought about a finding that does not begin before it."""
        cause, known = self.cause, known_of(self.cause.kind)
        if later.kind == cause.kind and later.severity == cause.severity == "low":
            return True  # many of one kind, and none of them grave
        if not known.spreads:
            members = (cause, *self.consequences)
            is_near = any(
                _lies_in(later.site, member.site) or _lies_in(member.site, later.site)
                for member in members
            )
            is_named = later.kind in known.consequences
            return is_named and (is_near or known.consequences == {"loss_plateau"})
        if later.kind in NEVER_EXPLAINED:
            return False
        if cause.severity == "low" and later.severity != "low":
            return False
        return later.step - self.until <= self.patience

    def story(self, evidence: tuple[Excerpt, ...] = ()) -> Story:
        """The story as far as it is known."""
        advice = known_of(self.cause.kind).try_
        return Story(self.cause, tuple(self.consequences), evidence, advice)

    def add(self, later: Anomaly) -> None:
        """Take a finding that it explains."""
        self.consequences.append(later)
        self.until = max(self.until, later.last_step)


def in_causal_order(found: Iterable[Anomaly], ranks: Mapping[str, Rank]) -> list[Anomaly]:
    """Findings by the step at which they begin, and by where in a step their kind comes about."""
    some = list(found)
    failed = {anomaly.step for anomaly in some if _is_origin(anomaly)}

    def order(anomaly: Anomaly) -> tuple[int, int, Rank, int, str]:
        step, place, rank, weight, kind = _order(anomaly, ranks)
        is_before = kind in OVERFLOWS and anomaly.severity != "low" and step in failed
        return step, -2 if is_before else place, rank, weight, kind

    return sorted(some, key=order)


def link(anomaly: Anomaly, drafts: list[Draft], recorded: Recorded) -> None:
    """Add a finding to the first story that explains it, or begin one."""
    draft = next((draft for draft in drafts if draft.explains(anomaly)), None)
    if draft is None:
        drafts.append(Draft.of(anomaly, recorded))
    else:
        draft.add(anomaly)


def excerpts(recorded: Recorded, cause: Anomaly) -> tuple[Excerpt, ...]:
    """The series of a cause and of the loss around its first step."""
    keys = recorded.keys()
    losses = [key for key in keys if is_total_loss(recorded.key_info(key))][:1]
    shown = []
    for key in dict.fromkeys((_shown_key(recorded, cause), *losses)):
        if key not in keys:
            continue
        steps, values = recorded.series(key)
        if values.ndim != 1 or not len(steps):
            continue
        place = int(np.searchsorted(steps, cause.step))
        part = slice(max(0, place - _AROUND), place + _AROUND + 1)
        shown.append(Excerpt(key, steps[part].copy(), values[part].copy()))
    return tuple(shown)


def _shown_key(recorded: Recorded, cause: Anomaly) -> str:
    """The key of a cause; of one in most parameters, that whose worst update is as large as its."""
    if cause.site != ALL or not is_update(recorded.key_info(cause.key)):
        return cause.key
    distances = {}
    for series in trained(recorded):
        here = (series.steps >= cause.step) & (series.steps <= cause.last_step)
        values = series.where(here).finite().values
        if len(values):
            distances[series.key] = abs(float(values.max()) - cause.value)
    return min(distances, key=distances.__getitem__, default=cause.key)


def _lies_in(site: str, other: str) -> bool:
    """Whether a site is another one, or a part of it."""
    return f"{site}.".startswith(f"{other}.")


def _order(anomaly: Anomaly, ranks: Mapping[str, Rank]) -> tuple[int, int, Rank, int, str]:
    place = known_of(anomaly.kind).place
    if _is_origin(anomaly):
        place = -1
    weight = -SEVERITIES.index(anomaly.severity)
    return anomaly.step, place, ranks.get(anomaly.key, _LAST), weight, anomaly.kind


def _is_origin(anomaly: Anomaly) -> bool:
    """Whether it is where NaN or infinity began."""
    return anomaly.kind == "nonfinite" and anomaly.severity == "critical"


def _weight(anomaly: Anomaly) -> int:
    return _weight_of(anomaly.severity)


def _weight_of(severity: Severity) -> int:
    return SEVERITIES.index(severity)
