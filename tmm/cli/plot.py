"""``tmm plot``: series of a run, in the terminal or as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tmm.cli.output import AsJson, Query, Root, fail, print_json, print_table, told
from tmm.metrics import FloatArray
from tmm.reader import open_run
from tmm.runs.catalog import find_run

_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST = 60  # series in one picture


def plot(
    query: Query,
    key: Annotated[str, typer.Argument(help="A regular expression of keys.")] = ".*loss.*",
    root: Root = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A .html, .png, .svg or .pdf file.")
    ] = None,
    log: Annotated[bool, typer.Option(help="Logarithmic values.")] = False,
    width: Annotated[int, typer.Option(min=1, help="Characters of a line.")] = 48,
    as_json: AsJson = False,
) -> None:
    """Plot series of a run; needs the extra ``plot`` for pictures."""
    with told(), open_run(find_run(query, root).path) as run:
        keys = [k for k in run.keys(key) if run.series(k)[1].ndim == 1]
        if not keys:
            near = ", ".join(run.keys()[:5])
            fail(f"no key matches {key!r}; there are {near}")
        series = {found: run.series(found) for found in keys[:_MOST]}
    if as_json:
        print_json({k: {"steps": s.tolist(), "values": v.tolist()} for k, (s, v) in series.items()})
    elif output is None:
        rows = [
            (k, sparkline(v, width, log=log), float(v[-1]))
            for k, (_, v) in series.items()
            if len(v)
        ]
        print_table(f"{len(keys)} series, first to last", ("key", "", "last"), rows)
    else:
        _picture(series, output, log=log)
        typer.echo(f"wrote {output}")
    if len(keys) > _MOST:
        typer.echo(f"the first {_MOST} of {len(keys)} series are shown", err=True)


def sparkline(values: FloatArray, width: int, *, log: bool = False) -> str:
    """Values as a line of blocks, the mean of each part; ``!`` where one is not finite."""
    if log:
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.log10(values)
    if not len(values):
        return ""
    parts = np.array_split(values, min(width, len(values)))
    finite = values[np.isfinite(values)]
    if not len(finite):
        return "!" * len(parts)
    low, high = float(finite.min()), float(finite.max())
    line = ""
    for part in parts:
        mean = float(part.mean())
        if not math.isfinite(mean):
            line += "!"
            continue
        height = (mean - low) / (high - low) if high > low else 0.5
        line += _BLOCKS[min(int(height * len(_BLOCKS)), len(_BLOCKS) - 1)]
    return line


def _picture(series: dict[str, tuple[np.ndarray, FloatArray]], path: Path, *, log: bool) -> None:
    try:
        import plotly.graph_objects as graph
    except ImportError:
        fail("pictures need plotly: pip install 'tmm-compile[plot]'")
    figure = graph.Figure()
    for key, (steps, values) in series.items():
        figure.add_scatter(x=steps, y=values, name=key, mode="lines")
    figure.update_layout(template="plotly_white", xaxis_title="step", showlegend=True)
    if log:
        figure.update_yaxes(type="log")
    with told():
        if path.suffix == ".html":
            figure.write_html(path, include_plotlyjs=True)
        elif path.suffix in (".png", ".svg", ".pdf"):
            figure.write_image(path, width=1000, height=600)
        else:
            fail(f"--output {str(path)!r}: write a .html, .png, .svg or .pdf file")
