"""``tmm anomalies``: what is wrong with a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from tmm.cli.output import AsJson, Query, Root, fail, print_json, print_table, told

SEVERITIES = ("low", "medium", "high", "critical")


def anomalies(
    query: Query,
    root: Root = Path("runs"),
    kind: Annotated[str | None, typer.Option("--type", "-t", help="One kind only.")] = None,
    at_least: Annotated[
        str, typer.Option("--severity", help="low, medium, high or critical.")
    ] = "low",
    as_json: AsJson = False,
    auto: Annotated[bool, typer.Option(hidden=True, help="Every detector; as always.")] = False,
) -> None:
    """Say what is wrong with a run; exits with 0 whether or not something is."""
    from tmm.analysis import find_anomalies
    from tmm.runs.catalog import find_run
    from tmm.runs.recorded_run import open_run

    if at_least not in SEVERITIES:
        fail(f"--severity {at_least!r} is none of {', '.join(SEVERITIES)}")
    with told(), open_run(find_run(query, root).path) as run:
        found = find_anomalies(run)
    least = SEVERITIES.index(at_least)
    found = tuple(a for a in found if SEVERITIES.index(a.severity) >= least)
    if kind is not None:
        kinds = sorted({anomaly.kind for anomaly in found})
        found = tuple(anomaly for anomaly in found if anomaly.kind == kind)
        if not found:
            fail(f"no anomaly of type {kind!r}; there are {', '.join(kinds) or 'none'}")
    if as_json:
        print_json([asdict(anomaly) for anomaly in found])
        return
    rows = [(a.severity, a.kind, _steps(a.step, a.last_step), a.key, a.text) for a in found]
    print_table("anomalies", ("severity", "kind", "steps", "key", ""), rows)


def _steps(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"
