"""Figures of one run's keys: lines, heat maps, and values over depth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import numpy as np

from tmm.core.keys import is_loss
from tmm.core.metrics import FloatArray
from tmm.core.records import StepArray
from tmm.runs.recorded_run import Run
from tmm.views.plots.groups import group_keys
from tmm.views.plots.layer_figures import depths, heatmaps
from tmm.views.plots.reduce import thin
from tmm.views.plots.style import (
    INFINITY_COLOUR,
    NAN_COLOUR,
    RUN_COLOURS,
    depth_colours,
    is_logarithmic,
    marks_axis,
    require_package,
    tell,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FigureKind: TypeAlias = Literal["lines", "heatmap", "depth"]
FIGURE_KINDS: tuple[FigureKind, ...] = get_args(FigureKind)

_MOST_LINES = 60
_MOST_POINTS = 4000  # of a line
_MOST_PANELS = 12


def figure(
    run: Run, pattern: str | None = None, kind: FigureKind = "lines", *, log: bool | None = None
) -> Figure:
    """The figure that ``Run.plot`` describes."""
    if kind not in FIGURE_KINDS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(map(repr, FIGURE_KINDS))}")
    if pattern is not None and not isinstance(pattern, str):
        raise TypeError(f"pattern={pattern!r} is not text; give one regular expression")
    require_package("plotly", "a picture of a run")
    keys = _keys(run, pattern, kind)
    if kind == "lines":
        return _lines(run, keys, log)
    groups, others = group_keys(run, keys)
    if not groups:
        raise ValueError(
            f"kind={kind!r} needs metrics of layers, and {others[0]!r} belongs to no layer;"
            ' use kind="lines"'
        )
    if len(groups) > _MOST_PANELS:
        names = ", ".join(group.name for group in groups[:_MOST_PANELS])
        raise ValueError(
            f"pattern={pattern!r} matches {len(groups)} metrics of layers, too many for one"
            f" picture; narrow it to some of {names}, ..."
        )
    return heatmaps(run, groups) if kind == "heatmap" else depths(run, groups, log)


def _keys(run: Run, pattern: str | None, kind: FigureKind) -> list[str]:
    """The numbers that match; losses where nobody says what."""
    numbers = [key for key in run.keys() if not run.is_histogram(key)]  # noqa: SIM118
    if not numbers:
        raise ValueError(f"the run {run.path} has recorded no numbers to plot")
    if pattern is None:
        losses = [key for key in numbers if is_loss(run.key_info(key))]
        return losses if losses and kind == "lines" else numbers
    matching = set(run.keys(pattern))  # says what is wrong with a pattern
    found = [key for key in numbers if key in matching]
    if found:
        return found
    near = [key for key in numbers if re.search(pattern, key)][:5]
    near = near or get_close_matches(pattern, numbers, n=5, cutoff=0.3) or numbers[:5]
    raise ValueError(
        f"no key that is a number matches pattern={pattern!r} from its beginning (re.match);"
        f" nearest: {near}"
    )


def _lines(run: Run, keys: Sequence[str], log: bool | None) -> Figure:
    from plotly.graph_objects import Figure

    shown = keys[:_MOST_LINES]
    plot = Figure()
    colours = depth_colours(len(shown)) if len(shown) > len(RUN_COLOURS) else list(RUN_COLOURS)
    series = {key: run.series(key) for key in shown}
    logarithmic = log
    if logarithmic is None:
        logarithmic = is_logarithmic([values for _, values in series.values()])
    notes = []
    for (key, (steps, values)), colour in zip(series.items(), colours, strict=False):
        places = thin(values, _MOST_POINTS)
        if len(places) < len(values):
            notes.append((len(values), len(places)))
        _add_line(plot, steps[places], values[places], key, colour, logarithmic)
    _finish(plot, logarithmic)
    told = []
    if len(keys) > len(shown):
        told.append(f"the first {len(shown)} of {len(keys):,} series")
    if notes:
        before, after = max(notes)
        told.append(
            f"{before:,} steps drawn by {after:,} points; the smallest, the largest and what is"
            " not finite are kept"
        )
    tell(plot, told)
    plot.update_layout(showlegend=True, yaxis_title=shown[0] if len(shown) == 1 else None)
    return plot


def _add_line(
    plot: Figure, steps: StepArray, values: FloatArray, name: str, colour: str, logarithmic: bool
) -> None:
    """Add a series; what its axis cannot show breaks the line, and is marked on the lower edge."""
    unseen = [
        (np.isnan(values), "NaN", NAN_COLOUR),
        (np.isinf(values), "infinite", INFINITY_COLOUR),
    ]
    if logarithmic:
        unseen.append((np.isfinite(values) & (values <= 0), "not positive", colour))
    seen = ~np.logical_or.reduce([kind for kind, _, _ in unseen])
    lonely = not (seen[:-1] & seen[1:]).any()
    plot.add_scatter(
        x=steps,
        y=np.where(seen, values, np.nan),
        name=name,
        legendgroup=name,
        mode="markers" if lonely else "lines",
        line={"color": colour, "width": 1.6},
        marker={"color": colour},
        hovertemplate="%{y:.6g}<extra>%{fullData.name}</extra>",
    )
    for kind, mark, mark_colour in unseen:
        if kind.any():
            plot.add_scatter(
                x=steps[kind],
                y=np.zeros(int(kind.sum())),
                yaxis="y2",
                name=f"{name}: {mark}",
                legendgroup=name,
                showlegend=False,
                mode="markers",
                cliponaxis=False,
                marker={"symbol": "x-thin-open", "size": 8, "color": mark_colour},
                text=[f"{value:.6g}" for value in values[kind]],
                hovertemplate="%{text}<extra>%{fullData.legendgroup}</extra>",
            )


def _finish(plot: Figure, logarithmic: bool) -> None:
    plot.update_layout(
        template="plotly_white",
        hovermode="x unified",
        xaxis_title="step",
        yaxis={"type": "log" if logarithmic else "linear", "exponentformat": "e"},
        yaxis2=marks_axis("y", 1),
    )
