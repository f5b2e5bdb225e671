"""``tmm watch``: a run as it goes, live."""

from __future__ import annotations

import re
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tmm.cli.output import AsJson, Root, fail, print_json, told
from tmm.cli.runs_commands import Pattern

if TYPE_CHECKING:
    from rich.console import Console

    from tmm.runs.run_record import RunRecord
    from tmm.views.live.live_snapshot import Follower, Snapshot

_LINES_OF_JSON = 1000


def watch(
    query: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Id of a run, the beginning of one, its name or path; without it, the newest that"
            " is running, or else the newest.",
        ),
    ] = None,
    root: Root = Path("runs"),
    key: Pattern = None,
    every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between looks; more if a look is slow.")
    ] = 1.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print one frame; so it is, too, without a terminal.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a run live, while it is recorded: values, throughput and what is wrong.

    It only reads. It exits with 0 once the run has ended, however that was; with 1 if the run is
    deleted, and with 130 on Ctrl-C, which leaves the training alone.
    """
    from rich.console import Console

    from tmm.cli.watch_screen import Screen
    from tmm.runs.catalog import find_run
    from tmm.views.live.live_snapshot import Follower

    for pattern in key or []:
        try:
            re.compile(pattern)
        except re.error as error:
            fail(f"--key {pattern!r} is not a regular expression: {error}")
    with told():
        record = find_run(query, root) if query is not None else _newest(root)
    if record.status == "broken":
        fail(f"the run {record.id} is broken: {record.reason}")
    console = Console()
    with told():
        follower = Follower(record.path, key or [])
    with closing(follower.run):
        if once or as_json or not console.is_terminal or console.is_dumb_terminal:
            with told():
                _print_once(follower, console, as_json)
        else:
            Screen(follower, console, every).show()


def _newest(root: Path) -> RunRecord:
    from tmm.runs.catalog import find_run, list_runs
    from tmm.runs.remote import address_of

    found = list_runs(root, status="running", limit=1) or list_runs(root, limit=1)
    if not found:
        raise LookupError(f"there is no run under {str(root)!r}")
    if address_of(found[0].path) is not None:  # a copy, to be read
        return find_run(found[0].address, root)
    return found[0]


def _print_once(follower: Follower, console: Console, as_json: bool) -> None:
    from tmm.analysis.registry import all_detectors
    from tmm.cli.watch_frame import draw, lines_for_keys
    from tmm.views.live.judge import judged

    findings = judged(follower.run, all_detectors())
    height = console.height - 1
    lines = _LINES_OF_JSON if as_json else lines_for_keys(height, len(findings.stories))
    snapshot = follower.snapshot(lines, findings)
    if as_json:
        print_json(_as_mapping(snapshot))
    else:
        console.print(draw(snapshot, console.width, height))


def _as_mapping(snapshot: Snapshot) -> dict[str, Any]:
    stands = snapshot.standing
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "status": stands.status,
        "reason": stands.reason,
        "seconds": stands.seconds,
        "steps": snapshot.steps,
        "last_step": snapshot.last_step,
        "per_second": snapshot.rates,
        "keys": [
            {
                "key": line.key,
                "step": int(line.series.steps[-1]),
                "value": line.series.values[-1].tolist(),
                "severity": line.severity,
            }
            for line in snapshot.lines
            if len(line.series.steps)
        ],
        "stories": [story.to_dict() for story in snapshot.findings.stories],
        "anomalies": [asdict(anomaly) for anomaly in snapshot.findings.anomalies],
    }
