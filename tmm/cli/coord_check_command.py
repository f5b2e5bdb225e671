"""``tmm coord-check``: what muP does to an MLP and a GPT, layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tmm.cli.output import AsJson, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from tmm.coordinate_check.result import CoordinateCheck

FLAT = 0.15
"""An exponent up to this size counts as none: at most a factor 1.4 over a factor of 8 in width."""


def coord_check(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder for the plots, as PNG and HTML. Needs the extra tmm-compile\\[plot].",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out the largest width and a seed: half a minute.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a small MLP and a small GPT in the standard parametrization and in muP.

    Trains each at several widths for a few steps and prints the exponents with which the updates
    and outputs of its layers grow. Takes about two minutes on two CPU cores.
    """
    from rich.console import Console

    from tmm.cli.coord_check_examples import examples
    from tmm.coordinate_check.coordinate_check import coord_check as check_coordinates

    if output is not None:
        _prepare(output)
    widths, seeds = ((128, 256, 512), 2) if quick else ((128, 256, 512, 1024), 3)
    console = Console(stderr=as_json)
    results = {}
    console.print(
        "Exponents with which the size of a coordinate grows with the width,"
        f" {', '.join(map(str, widths))}; red beyond ±{FLAT}.\n",
        highlight=False,
    )
    for example in examples():
        found = check_coordinates(
            *(example.make_model, widths, example.batches, example.loss),
            seeds=seeds,
            progress=True,
        )
        results[example.name] = [asdict(growth) for growth in found.growths]
        console.print(exponent_table(found, example.name))
        console.print(_verdict(found), highlight=False)
        if output is not None:
            _save(found, output, example.name, as_json=as_json)
        console.print()
    if as_json:
        print_json({"widths": widths, "examples": results})


def exponent_table(found: CoordinateCheck, title: str) -> Table:
    """The fitted exponents: layers down, terms across."""
    from rich.table import Table
    from rich.text import Text

    from tmm.coordinate_check.result import TERMS

    table = Table(title=title, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for term in TERMS:
        table.add_column(term, justify="right", no_wrap=True)
    growths = {(growth.layer, growth.term): growth for growth in found.growths}
    for layer in found.layers:
        cells = []
        for term in TERMS:
            growth = growths.get((layer, term))
            if growth is None or growth.note == "zero at every width":
                cells.append(Text("0" if growth else "", "dim"))
            elif growth.note:
                cells.append(Text(growth.note, "red"))
            else:
                style = "red" if abs(growth.exponent) > FLAT else "green"
                cells.append(Text(growth.exponent_text, style))
        table.add_row(Text(layer), *cells)
    return table


def _verdict(found: CoordinateCheck) -> str:
    from tmm.coordinate_check.result import TERMS

    fits = [growth for growth in found.growths if growth.term == TERMS[0] and not growth.note]
    if not fits:
        return "No update has an exponent."
    largest = max(fits, key=lambda growth: abs(growth.exponent))
    return f"Largest exponent of an update: {largest.exponent_text}, of {largest.layer}."


def _prepare(output: Path) -> None:
    """Fail before minutes of training rather than after them."""
    from tmm.coordinate_check.plot import WHAT
    from tmm.views.plots.style import require_package

    try:
        for package in ("plotly", "kaleido"):
            require_package(package, WHAT)
        output.mkdir(parents=True, exist_ok=True)
    except (ImportError, OSError) as error:
        raise typer.BadParameter(str(error), param_hint="--output") from error


def _save(found: CoordinateCheck, folder: Path, name: str, *, as_json: bool) -> None:
    try:
        for path in found.save(folder / name.lower().replace(",", "").replace(" ", "-"), name):
            typer.echo(f"Plot: {path}", err=as_json)
    except RuntimeError as error:  # kaleido without a browser; the page is written by then
        typer.secho(str(error).strip(), err=True, fg=typer.colors.RED)
        raise typer.Exit(1) from None
