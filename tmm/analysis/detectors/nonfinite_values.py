"""NaN and infinity: where they appeared first, and where they got to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tmm.analysis.anomaly import Anomaly, Episode, Severity, episodes, number
from tmm.analysis.detectors.evidence import Evidence, evidence, newest_evidence, tensor_of
from tmm.analysis.order import Rank, execution_ranks
from tmm.analysis.recent import RecentSeries
from tmm.core.families import ACTIVATION, ATTENTION, STEP, Phase
from tmm.core.keys import block_of_norm, is_inside
from tmm.core.series_by_key import Recorded

_PLACES = {
    Phase.FORWARD: "the output of",
    Phase.BACKWARD: "the gradient of the output of",
    Phase.GRADIENT: "the gradient of",
    Phase.UPDATE: "the update of",
    Phase.PARAMETER: "the parameter",
}


def nonfinite(recorded: Recorded, *, since: int | None = None) -> Iterator[Anomaly]:
    """NaN and infinity in what a model computes, in its loss, gradients, updates and parameters.

    One row per tensor, for the first recorded steps in a row that have them: critical for the one
    where it began (`first_nonfinite`), high for the others. Infinities without NaN in every
    recorded step of a tensor, while all losses are finite, are low: masks are made of them.

    What counts: ``nan_count`` and ``inf_count`` above zero; other built-in metrics that are not
    finite, unless counts or extremes of the same tensor and step say that it is; your own functions
    once they were finite. ``std``, ``kurtosis``, ``cosine`` and ``relative_norm`` never count: a
    constant or a zero makes them NaN, too. Gradients of steps that a ``GradScaler`` skipped are
    left out. With ``since``, what was before that step is not told of.
    """
    found = _all_found(recorded, since, execution_ranks(recorded))
    yield from _told(found, recorded)


def nonfinite_at(
    recent: RecentSeries, step: int, *, anew: bool
) -> tuple[tuple[Anomaly, ...], frozenset[str]]:
    """NaN and infinity in the newest step: what `nonfinite` tells of it, and the keys that show it.

    Those of what is harmless are not among the keys. Without ``anew`` nothing is told.
    """
    shown = newest_evidence(recent)
    if not shown:
        return (), frozenset()
    ranks = recent.ranks
    losses = [key for key, (part, _) in ranks.items() if part == Phase.LOSS]
    if not anew and not any(item.may_be_harmless for item in shown):
        return (), frozenset(key for item in shown for key in item.flagged)
    asked = shown if anew else [item for item in shown if item.may_be_harmless]
    part = recent.part(frozenset(losses).union(*(item.keys for item in asked)))
    found = _all_found(part, step, ranks)
    harmless = {tensor_of(item.evidence.series.info) for item in found if item.harmless}
    keys = frozenset(key for item in shown if item.tensor not in harmless for key in item.flagged)
    return tuple(_told(found, part)) if anew else (), keys


def first_nonfinite(recorded: Recorded) -> Anomaly | None:
    """Where NaN or infinity appeared first: the smallest step, in it the earliest in execution.

    Outputs of modules come first, in the order of the forward pass, then the loss, gradients from
    the last layer to the first, updates and parameters. Of a module and one inside of it, it is the
    inner one. None where there is none.
    """
    return next(
        (anomaly for anomaly in nonfinite(recorded) if anomaly.severity == "critical"), None
    )


@dataclass(frozen=True, eq=False)
class _Found:
    """Evidence of one tensor, and its rank in the step."""

    evidence: Evidence
    rank: Rank
    harmless: bool

    @property
    def site(self) -> str:
        return self.evidence.series.site

    @cached_property
    def first(self) -> Episode:
        found = self.evidence
        return next(episodes(found.series, found.flagged, badness=found.badness))

    @property
    def step(self) -> int:
        return self.first.first_step

    @property
    def what(self) -> str:
        info = self.evidence.series.info
        if ATTENTION.begins(info.kind):
            return f"the attention of {self.site}"
        if info.kind == STEP.name:
            block = block_of_norm(info)
            return f"the gradient norm of {f'block {block}' if block else 'all parameters'}"
        if self.rank[0] is Phase.LOSS:
            return info.key
        if self.rank[0] is Phase.FORWARD and info.kind != ACTIVATION.name:
            return f"the recorded value {info.key}"
        return f"{_PLACES[self.rank[0]]} {self.site}"

    @property
    def proof(self) -> str:
        value = self.evidence.value
        metric = self.evidence.series.metric
        if metric in ("nan_count", "inf_count"):
            elements = "element" if value == 1 else "elements"
            return f"{number(value)} {'NaN' if metric == 'nan_count' else 'infinite'} {elements}"
        return "NaN" if np.isnan(value) else "infinities"

    @property
    def when(self) -> str:
        first = self.first
        times = int(self.evidence.flagged.sum())
        more = f" and in {times - first.count} later recorded steps" if times > first.count else ""
        return first.when + more


def _all_found(recorded: Recorded, since: int | None, ranks: Mapping[str, Rank]) -> list[_Found]:
    """Everything with evidence, in the order of execution."""
    everything = list(evidence(recorded, ranks))
    losses = any(part == Phase.LOSS for part, _ in ranks.values())
    of_losses = (e for e in everything if ranks[e.series.key][0] is Phase.LOSS)
    failing = [e.series.steps[e.flagged] for e in of_losses]
    failed = np.concatenate([np.empty(0, dtype=np.int64), *failing])
    found = []
    for item in everything:
        if since is not None:
            item = replace(item, flagged=item.flagged & (item.series.steps >= since))
        if item.flagged.any():
            rank = ranks[item.series.key]
            stays = rank[0] is Phase.FORWARD and item.is_always_infinite and losses
            harmless = stays and not np.isin(item.series.steps, failed).any()
            found.append(_Found(item, rank, harmless))
    return sorted(found, key=lambda item: item.rank)


def _told(found: list[_Found], recorded: Recorded) -> Iterator[Anomaly]:
    origin = _origin(found)
    if origin is not None:
        yield _anomaly(origin, "critical", _origin_text(origin, recorded))
    for item in found:
        if item is origin:
            continue
        text = f"{item.what} has {item.proof} {item.when}"
        if item.harmless:
            text += ", that is always, while the loss is finite; masks are made so."
            yield _anomaly(item, "low", text)
        else:
            assert origin is not None, "what is not harmless has an origin"
            text += f"; it began in {origin.what} at step {origin.step}."
            yield _anomaly(item, "high", text)


def _origin(found: list[_Found]) -> _Found | None:
    candidates = [item for item in found if not item.harmless]
    if not candidates:
        return None
    step = min(item.step for item in candidates)
    candidates = [item for item in candidates if item.step == step]
    origin = candidates[0]
    while inner := [
        item
        for item in candidates
        if item.rank[0] == origin.rank[0] is Phase.FORWARD and is_inside(item.site, origin.site)
    ]:
        origin = inner[0]
    return origin


def _origin_text(origin: _Found, recorded: Recorded) -> str:
    text = f"{origin.proof} {origin.when}: first in {origin.what}"
    earlier = recorded.steps[recorded.steps < origin.step]
    if len(earlier):
        text += f"; at step {int(earlier[-1])}, the last one recorded before, there was none"
    return f"{text[0].upper()}{text[1:]}."


def _anomaly(item: _Found, severity: Severity, text: str) -> Anomaly:
    text = text.replace("the", "The", 1) if text.startswith("the ") else text
    return item.first.anomaly("nonfinite", severity, 0.0, text)
