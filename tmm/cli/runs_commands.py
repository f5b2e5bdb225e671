"""``tmm runs``: list, show, compare, delete, prune, export."""

from __future__ import annotations

import re
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tmm.cli.output import AsJson, Query, Root, fail, print_json, print_table, told
from tmm.cli.terminal import agreed, say
from tmm.runs.state import STATUSES

if TYPE_CHECKING:
    from tmm.analysis import Comparison
    from tmm.runs.run_record import RunRecord

app = typer.Typer(help="List, show, compare, delete, prune and export runs.", no_args_is_help=True)

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
Pattern = Annotated[
    list[str] | None,
    typer.Option("--key", "-k", "--metric", "-m", help="Keys, as regular expressions."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


@app.command("list")
def list_(
    root: Root = Path("runs"),
    project: Annotated[str | None, typer.Option(help="Those of one project.")] = None,
    status: Annotated[str | None, typer.Option(help=f"One of {', '.join(STATUSES)}.")] = None,
    tag: Annotated[str | None, typer.Option(help="Those with this tag.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many, the newest.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List runs, newest first."""
    from tmm.runs.catalog import list_runs
    from tmm.runs.remote import address_of

    if status is not None and status not in STATUSES:
        fail(f"--status {status!r} is none of {', '.join(STATUSES)}")
    with told():
        records = list_runs(root, project=project, status=status, tag=tag, limit=limit)
    if as_json:
        print_json([described(record) for record in records])
        return
    several = len({record.project for record in records}) > 1
    rows = [
        (
            *(r.id, r.status, r.steps, r.started, r.project if several else None),
            *(r.name if r.name != r.id else None, r.tags, r.reason),
        )
        for r in records
    ]
    columns = ("id", "status", "steps", "started", "project", "name", "tags", "reason")
    print_table(f"runs under {address_of(root) or root}", columns, rows, whole=4)


@app.command()
def show(
    query: Query,
    root: Root = Path("runs"),
    key: Pattern = None,
    as_json: AsJson = False,
) -> None:
    """Show a run: what it is, and each key's first, last, least and largest value."""
    from tmm.analysis import summarize
    from tmm.runs.catalog import find_run
    from tmm.runs.recorded_run import open_run

    with told():
        record = find_run(query, root)
        if record.status == "broken":
            fail(f"the run {record.id} is broken: {record.reason}")
        with open_run(record.path) as run:
            found = _matching(run.keys(), key)
            wanted = set(found)
            summaries = [s for s in summarize(run) if s.key in wanted]
            events = [asdict(event) for event in run.events]
    if as_json:
        keys = [asdict(summary) for summary in summaries]
        print_json({**described(record), "keys": keys, "events": events})
        return
    rows: list[tuple[str, object]] = [
        (name, value) for name, value in described(record).items() if name != "config"
    ]
    rows += [(f"config.{name}", value) for name, value in (record.config or {}).items()]
    print_table(record.name, ("", ""), [row for row in rows if row[1] not in (None, "", [])])
    columns = ("key", "values", "first", "last", "min", "max", "mean", "not finite")
    print_table(
        "keys",
        columns,
        [
            (s.key, s.count, s.first, s.last, s.minimum, s.maximum, s.mean, s.nonfinite or None)
            for s in summaries
        ],
    )
    if events:
        print_table("events", ("step", "kind", "text"), [tuple(e.values()) for e in events])


@app.command()
def compare(
    queries: Annotated[list[str], typer.Argument(help="Two runs or more.")],
    root: Root = Path("runs"),
    key: Pattern = None,
    as_json: AsJson = False,
) -> None:
    """Compare runs: configurations, final values, and where they part first."""
    from tmm.analysis import compare as compare_runs
    from tmm.analysis import first_divergence
    from tmm.runs.catalog import find_run
    from tmm.runs.recorded_run import open_run

    if len(queries) < 2:
        fail("compare needs two runs or more")
    with told():
        records = [find_run(query, root) for query in queries]
        if len({record.id for record in records}) < len(records):
            fail("compare: the same run is given twice")
        names = _names(records)
        runs = {name: open_run(record.path) for name, record in zip(names, records, strict=True)}
        try:
            known = sorted({found for run in runs.values() for found in run.keys(None)})
            keys = _matching(known, key) if key else None
            configs = {n: r.config or {} for n, r in zip(names, records, strict=True)}
            result = compare_runs(runs, keys=keys, configs=configs)
            first, second, *_ = runs.values()
            divergence = first_divergence(first, second, keys=keys)
        finally:
            for run in runs.values():
                run.close()
    if as_json:
        parted = None if divergence is None else asdict(divergence)
        print_json({**_as_mapping(result), "first_divergence": parted})
        return
    print_comparison(result, names)
    if divergence is not None:
        say(
            f"{names[0]} and {names[1]} part at step {divergence.step}, first in {divergence.key}:"
            f" {divergence.a:.6g} and {divergence.b:.6g}"
        )


def _as_mapping(result: Comparison) -> dict[str, Any]:
    return {
        "runs": result.runs,
        "config": result.configuration,
        "metrics": [
            {
                "key": m.key,
                "direction": m.direction,
                "final": m.final,
                "best": m.best,
                "steps": m.steps.tolist(),
                "values": {run: values.tolist() for run, values in m.values.items()},
            }
            for m in result.metrics
        ],
    }


def print_comparison(result: Comparison, names: list[str]) -> None:
    """Print a comparison as two tables."""
    differing = [
        (name, *(values.get(run) for run in names)) for name, values in result.configuration.items()
    ]
    print_table("configurations that differ", ("", *names), differing)
    rows = [(m.key, *(m.final.get(run) for run in names), m.best or "") for m in result.metrics]
    print_table("final values", ("key", *names, "best"), rows)


@app.command()
def delete(query: Query, root: Root = Path("runs"), yes: Yes = False) -> None:
    """Delete a run, after asking."""
    from tmm.runs.catalog import delete_run, find_run

    with told():
        record = find_run(query, root)
        if not yes:
            agreed(f"Delete {record.id} ({record.name}, {record.status})?")
        kept = delete_run(record, root)
    say(f"deleted {record.id}")
    _tell_of_kept(record, kept)


@app.command()
def prune(
    older_than: Annotated[str, typer.Option(help="Such as 30d, 12h or 2w.")],
    root: Root = Path("runs"),
    keep_tagged: Annotated[bool, typer.Option(help="Keep runs that have tags.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete the runs that started longer ago, after asking; never one that is running."""
    from tmm.runs.catalog import runs_to_prune

    age = _duration(older_than)
    with told():
        records = runs_to_prune(root, age, keep_tagged=keep_tagged)
        if records and not yes:
            for record in records:
                say(f"{record.id}  {record.name}  {record.status}", error=True)
            agreed(f"Delete these {len(records)} runs?", error=True)
        deleted = [record for record in records if _is_deleted(record, root)]
    if as_json:
        print_json([record.id for record in deleted])
    else:
        say(f"deleted {len(deleted)} runs")


def _is_deleted(record: RunRecord, root: Path) -> bool:
    """Delete one of several runs; one that somebody records by now is left alone."""
    from tmm.runs.catalog import delete_run

    try:
        _tell_of_kept(record, delete_run(record, root))
    except ValueError as error:
        say(str(error), error=True)
        return False
    return True


def _tell_of_kept(record: RunRecord, kept: tuple[str, ...]) -> None:
    if kept:
        say(f"{record.path} keeps what is not the run's: {', '.join(kept)}", error=True)


@app.command()
def export(
    query: Query,
    output: Annotated[Path, typer.Argument(help="A .csv, .parquet, .jsonl or .h5 file.")],
    root: Root = Path("runs"),
    key: Annotated[str | None, typer.Option("--key", "-k", help="A regular expression.")] = None,
    file_format: Annotated[
        str | None, typer.Option("--format", help="csv, parquet, jsonl or hdf5.")
    ] = None,
) -> None:
    """Write a run's values to a file."""
    from tmm.runs.catalog import find_run
    from tmm.runs.export import export_run
    from tmm.runs.recorded_run import open_run

    with told(), open_run(find_run(query, root).path) as run:
        rows = export_run(run, output, file_format, key)
    say(f"wrote {rows} rows to {output}")


def described(record: RunRecord) -> dict[str, Any]:
    """A run in the words of the command line."""
    return {
        "id": record.id,
        "project": record.project,
        "name": record.name,
        "status": record.status,
        "reason": record.reason,
        "path": record.address,
        "started": record.started,
        "ended": record.ended,
        "seconds": record.seconds,
        "steps": record.steps,
        "last_step": record.last_step,
        "tags": list(record.tags),
        "notes": record.notes,
        "config": record.config or {},
    }


def _names(records: list[RunRecord]) -> list[str]:
    """Names of runs; the ids where names are not told apart."""
    names = [record.name for record in records]
    return names if len(set(names)) == len(names) else [record.id for record in records]


def _matching(keys: list[str], patterns: list[str] | None) -> list[str]:
    """The keys that any pattern matches; an exit where none does."""
    if not patterns:
        return keys
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        fail(f"--key {' '.join(patterns)!r} is not a regular expression: {error}")
    found = [key for key in keys if any(pattern.match(key) for pattern in compiled)]
    if not found:
        fail(f"no key matches {' or '.join(map(repr, patterns))}; there are {', '.join(keys[:5])}")
    return found


def _duration(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mhdw])", text)
    if match is None:
        fail(f"--older-than {text!r}: write a number and m, h, d or w, such as 30d")
    try:
        return timedelta(**{_UNITS[match[2]]: float(match[1])})
    except OverflowError:
        fail(f"--older-than {text!r} is longer than any run is old")
