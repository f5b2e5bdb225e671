"""What a page says of a run besides its values: how it went, how it was set up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tmm.analysis import Anomaly, Story
from tmm.core.families import SYSTEM
from tmm.core.keys import is_family, is_loss, is_total_loss, key_of, layer_of
from tmm.runs.recorded_run import Run
from tmm.runs.run_record import RunRecord
from tmm.runs.text_values import plain
from tmm.views.plots.reduce import thin
from tmm.views.report.snapshot import Snapshot

_MOST_POINTS = 2000  # of a curve
_FEWEST_POINTS = 56
_ALL_POINTS = 500_000  # of the curves of a run
_MOST_EVENTS = 500
_MOST_STORIES = 20
_MOST_TEXT = 200_000  # characters
_TOLD = frozenset(("id", "project", "name", "config", "tags", "notes"))
_RATES = ("tokens_per_second", "samples_per_second", "step_seconds")


def run_facts(run: Run, record: RunRecord, name: str, snapshot: Snapshot) -> dict[str, Any]:
    """Everything about a run that is no series."""
    steps = snapshot.steps
    text = explanation_text(run)
    info = {key: value for key, value in run.info.items() if key not in _TOLD}
    if isinstance(starts := info.pop("starts", None), list):
        info["starts"] = "; ".join(map(_start, starts))
    facts = {
        "name": name,
        "id": record.id,
        "project": record.project,
        "status": record.status,
        "reason": record.reason,
        "started": record.started,
        "seconds": record.seconds,
        "tags": record.tags,
        "notes": record.notes,
        "config": record.config or {},
        "environment": info,
        "steps": len(steps),
        "first": int(steps[0]) if len(steps) else None,
        "last": int(steps[-1]) if len(steps) else None,
        "keys": len(snapshot.keys()),
        "histograms": snapshot.histograms,
        "loss": _loss(snapshot),
        "rate": _rate(snapshot),
        "events": [vars(event) for event in snapshot.events[:_MOST_EVENTS]],
        "allEvents": len(snapshot.events),
        "explanation": text[:_MOST_TEXT],
        "explanationCut": len(text) > _MOST_TEXT,
    }
    result: dict[str, Any] = plain(facts)
    return result


def explanation_text(run: Run) -> str:
    """What ``tmm explain RUN`` prints; empty for a run without a model."""
    try:
        return run.text("explain.txt")
    except FileNotFoundError:
        return ""


def curves(
    snapshot: Snapshot, keys: Sequence[str]
) -> tuple[list[dict[str, Any]], list[np.ndarray[Any, Any]]]:
    """Series that are drawn as they are: their descriptions, and steps and values by turns."""
    most = min(_MOST_POINTS, max(_FEWEST_POINTS, _ALL_POINTS // max(1, len(keys))))
    described, arrays = [], []
    for key in keys:
        steps, values = snapshot.series(key)
        places = thin(values, most)
        arrays += [steps[places].astype(np.float64), values[places]]
        section = _section(snapshot, key)
        described.append({"key": key, "section": section, "count": len(places), "all": len(values)})
    return described, arrays


def anomaly_rows(anomalies: Sequence[Anomaly], snapshot: Snapshot) -> list[list[Any]]:
    """One row each: severity, kind, first and last step, key, layer, text."""
    known = set(snapshot.keys())
    return [
        [
            *(found.severity, found.kind, found.step, found.last_step, found.key),
            layer_of(snapshot.key_info(found.key)) if found.key in known else "",
            found.text,
        ]
        for found in anomalies
    ]


def story_facts(stories: Sequence[Story], snapshot: Snapshot) -> list[dict[str, Any]]:
    """The first stories, the gravest first: the cause, what followed, and series as text."""
    known = set(snapshot.keys())
    told = [
        {
            "severity": story.severity,
            "kind": story.cause.kind,
            "step": story.step,
            "last": story.last_step,
            "key": story.cause.key,
            "layer": layer_of(snapshot.key_info(story.cause.key))
            if story.cause.key in known
            else "",
            "text": story.cause.text,
            "after": story.afterwards.strip(),
            "advice": story.advice,
            "evidence": [part.told(story.step) for part in story.evidence],
        }
        for story in stories[:_MOST_STORIES]
    ]
    result: list[dict[str, Any]] = plain(told)
    return result


def _start(start: Any) -> str:
    if not isinstance(start, dict):
        return str(start)
    time, host, process = (start.get(name, "?") for name in ("time", "host", "process"))
    return f"{time} on {host}, process {process}"


def _section(snapshot: Snapshot, key: str) -> str:
    info = snapshot.key_info(key)
    if is_loss(info):
        return "loss"
    if info.kind == SYSTEM.name:
        rated = info.site.endswith(("_per_second", "step_seconds"))
        return "throughput" if rated else "system"
    return "steps" if is_family(info.kind) else "logged"


def _loss(snapshot: Snapshot) -> dict[str, Any] | None:
    infos = [snapshot.key_info(key) for key in snapshot.keys()]  # noqa: SIM118
    losses = [info for info in infos if is_loss(info) and len(snapshot.series(info.key)[1])]
    if not losses:
        return None
    key = min(losses, key=lambda info: not is_total_loss(info)).key
    steps, values = snapshot.series(key)
    finite = np.isfinite(values)
    result = {"key": key, "last": float(values[-1]), "step": int(steps[-1])}
    if finite.any():
        place = int(np.argmin(np.where(finite, values, np.inf)))
        result |= {"least": float(values[place]), "leastStep": int(steps[place])}
    return result


def _rate(snapshot: Snapshot) -> dict[str, Any] | None:
    known = set(snapshot.keys())
    for metric in _RATES:
        key = key_of(SYSTEM.name, metric)
        if key in known:
            values = snapshot.series(key)[1]
            finite = values[np.isfinite(values)]
            if len(finite):
                return {"key": key, "metric": metric, "median": float(np.median(finite))}
    return None
