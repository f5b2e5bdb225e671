"""``tmm report``: runs as one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tmm.cli.output import Root, fail, told
from tmm.cli.terminal import say


def report(
    queries: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Runs: id, the beginning of one, name or path.",
            show_default=False,
        ),
    ],
    root: Root = Path("runs"),
    output: Annotated[Path, typer.Option("--output", "-o", help="The .html file to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Write what runs recorded as one page that works offline; needs the extra ``plot``."""
    from tmm.runs.catalog import find_run
    from tmm.views.report import write_report

    if output.suffix not in (".html", ".htm"):
        fail(f"--output {str(output)!r}: write a .html file")
    with told():
        try:
            write_report([find_run(query, root) for query in queries], output)
        except ImportError as error:
            fail(str(error))
    say(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)")
