"""Private: the command ``tmm``: one module per command."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from tmm.cli import runs_commands as runs
from tmm.cli.anomalies_command import anomalies
from tmm.cli.coord_check_command import coord_check
from tmm.cli.demo_command import demo
from tmm.cli.info_command import explain, info
from tmm.cli.plot_command import plot
from tmm.cli.report_command import report
from tmm.cli.watch_command import watch

app = typer.Typer(
    name="tmm",
    help="See inside a PyTorch training run at almost no cost.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (demo, coord_check, anomalies, plot, report, watch, explain, info):
    app.command()(command)
app.add_typer(runs.app, name="runs")
for name, same in (
    *(("list", runs.list_), ("show", runs.show)),
    *(("compare", runs.compare), ("delete", runs.delete)),
):
    app.command(name, help=f"The same as: tmm runs {name}.")(same)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tmm {version('tmm-compile')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass
