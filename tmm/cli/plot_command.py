"""``tmm plot``: series of a run, in the terminal or as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from tmm.cli.output import AsJson, Query, Root, fail, print_json, print_table, told
from tmm.cli.terminal import say

if TYPE_CHECKING:
    from tmm.runs.recorded_run import Run

_MOST = 60  # series in one picture
_Kind: TypeAlias = Literal["lines", "heatmap", "depth"]  # what `Run.plot` takes


def plot(
    query: Query,
    key: Annotated[str, typer.Argument(help="A regular expression of keys.")] = ".*loss.*",
    root: Root = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .html, .png, .svg or .pdf file.")
    ] = None,
    kind: Annotated[
        _Kind, typer.Option(help="Of a picture: over steps, layers by steps, over layers.")
    ] = "lines",
    log: Annotated[
        bool | None, typer.Option("--log/--linear", help="The axis of values; else as they are.")
    ] = None,
    width: Annotated[int, typer.Option(min=1, help="Characters of a line.")] = 48,
    as_json: AsJson = False,
) -> None:
    """Plot series of a run; needs the extra ``plot`` for pictures."""
    from tmm.cli.sparkline import sparkline
    from tmm.runs.catalog import find_run
    from tmm.runs.recorded_run import open_run
    from tmm.views.plots.style import ENDINGS

    if output is not None and output.suffix not in ENDINGS:
        fail(f"--output {str(output)!r}: write a .html, .png, .svg or .pdf file")
    if output is None and kind != "lines":
        fail(f"--kind {kind} is a picture: give --output")
    with told(), open_run(find_run(query, root).path) as run:
        keys = [k for k in run.keys(key) if not run.is_histogram(k)]
        if not keys:
            near = ", ".join(run.keys()[:5])
            fail(f"no key matches {key!r}; there are {near}")
        if output is not None and not as_json:
            _write(run, key, kind, log, output)
            return
        series = {found: run.series(found) for found in keys[:_MOST]}
    if as_json:
        print_json({k: {"steps": s.tolist(), "values": v.tolist()} for k, (s, v) in series.items()})
    else:
        rows = [
            (k, sparkline(v, width, log=bool(log)), float(v[-1]))
            for k, (_, v) in series.items()
            if len(v)
        ]
        print_table(f"{len(keys)} series, first to last", ("key", "", "last"), rows)
    if len(keys) > _MOST:
        say(f"the first {_MOST} of {len(keys)} series are shown", error=True)


def _write(run: Run, key: str, kind: _Kind, log: bool | None, output: Path) -> None:
    from tmm.views.plots import write_figure

    try:
        write_figure(run.plot(key, kind, log=log), output)
    except ImportError as error:
        fail(str(error))
    say(f"wrote {output}")
