"""``tmm anomalies``: what is wrong with a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tmm.cli.output import AsJson, Query, Root, fail, print_json, print_table, told

if TYPE_CHECKING:
    from tmm.analysis import Anomaly, Story

SEVERITIES = ("low", "medium", "high", "critical")


def anomalies(
    query: Query,
    root: Root = Path("runs"),
    kind: Annotated[str | None, typer.Option("--type", "-t", help="One kind only.")] = None,
    at_least: Annotated[
        str, typer.Option("--severity", help="low, medium, high or critical.")
    ] = "low",
    every: Annotated[
        bool, typer.Option("--all", help="Each finding by itself, not folded under its cause.")
    ] = False,
    as_json: AsJson = False,
    auto: Annotated[bool, typer.Option(hidden=True, help="Every detector; as always.")] = False,
) -> None:
    """Say what is wrong with a run, causes first; exits with 0 whether or not something is."""
    from tmm.analysis import find_stories
    from tmm.runs.catalog import find_run
    from tmm.runs.recorded_run import open_run

    if at_least not in SEVERITIES:
        fail(f"--severity {at_least!r} is none of {', '.join(SEVERITIES)}")
    with told(), open_run(find_run(query, root).path) as run:
        stories = find_stories(run)
    least = SEVERITIES.index(at_least)
    stories = tuple(s for s in stories if SEVERITIES.index(s.severity) >= least)
    if not every:
        if kind is not None:
            _check_kind(kind, [story.cause for story in stories])
            stories = tuple(story for story in stories if story.cause.kind == kind)
        _show_stories(stories, as_json=as_json)
        return
    found = [a for s in stories for a in (s.cause, *s.consequences)]
    found = sorted(
        (a for a in found if SEVERITIES.index(a.severity) >= least),
        key=lambda a: (-SEVERITIES.index(a.severity), a.step),
    )
    if kind is not None:
        _check_kind(kind, found)
        found = [anomaly for anomaly in found if anomaly.kind == kind]
    if as_json:
        print_json([asdict(anomaly) for anomaly in found])
        return
    rows = [(a.severity, a.kind, _steps(a.step, a.last_step), a.key, a.text) for a in found]
    print_table("anomalies", ("severity", "kind", "steps", "key", ""), rows)


def _check_kind(kind: str, found: list[Anomaly]) -> None:
    kinds = sorted({anomaly.kind for anomaly in found})
    if kind not in kinds:
        fail(f"no anomaly of type {kind!r}; there are {', '.join(kinds) or 'none'}")


def _show_stories(stories: tuple[Story, ...], *, as_json: bool) -> None:
    if as_json:
        print_json([story.to_dict() for story in stories])
        return
    rows: list[tuple[str, str, str, str]] = []
    for story in stories:
        first, *others = _told(story)
        steps = _steps(story.step, story.last_step)
        rows.append((story.severity, story.cause.kind, steps, first))
        rows += [("", "", "", line) for line in others]
    print_table("what went wrong", ("severity", "cause", "steps", ""), rows)


def _told(story: Story) -> list[str]:
    """What happened, what to try, and the series around the onset."""
    lines = [story.text]
    if story.advice:
        lines.append(f"Try: {story.advice}.")
    return lines + [part.told(story.step) for part in story.evidence]


def _steps(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
