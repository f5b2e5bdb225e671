"""Figures of layers: their values over steps as heat maps, and over their depth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tmm.core.metrics import FloatArray
from tmm.runs.recorded_run import Run
from tmm.views.plots.groups import Group
from tmm.views.plots.reduce import FINITE, NAN, Reduced, reduce_table, worst_of
from tmm.views.plots.scale import SHARES, Scale, scale_for
from tmm.views.plots.style import (
    INFINITY_COLOUR,
    MAGNITUDES,
    NAN_COLOUR,
    SIGNED,
    depth_colours,
    is_logarithmic,
    marks_axis,
    tell,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MOST_COLUMNS = 400
_MOST_ROWS = 2000
_MOST_TOLD = 3  # in a title


def heatmaps(run: Run, groups: Sequence[Group]) -> Figure:
    """A panel for each group: layers by steps."""
    from plotly.subplots import make_subplots

    rows = [min(len(group.keys), _MOST_ROWS) for group in groups]
    heights = [max(160, min(1200, 16 * count)) for count in rows]
    gap = 90
    total = sum(heights) + gap * len(groups)
    plot = make_subplots(
        rows=len(groups),
        cols=1,
        row_heights=heights,
        vertical_spacing=min(gap / total, 1 / max(1, len(groups) - 1)),
        subplot_titles=[group.name for group in groups],
    )
    told = []
    for place, group in enumerate(groups, start=1):
        keys = group.keys[:_MOST_ROWS]
        if len(keys) < len(group.keys):
            told.append(f"the first {len(keys):,} of {len(group.keys):,} layers")
        which = worst_of(group.family, group.metric)
        reduced = reduce_table(*run.table(keys), _MOST_COLUMNS)
        told.append(reduced.note(which))
        worst = reduced.worst(which)
        scale = scale_for([worst], linear=bool({group.family, group.metric} & SHARES))
        domain = plot.get_subplot(place, 1).yaxis.domain
        bar = {"len": domain[1] - domain[0], "y": sum(domain) / 2, "lenmode": "fraction"}
        for trace in _heat_traces(reduced, worst, scale, group.labels[: len(keys)], bar):
            plot.add_trace(trace, row=place, col=1)
    plot.update_xaxes(type="category", title="step", nticks=12)
    plot.update_yaxes(autorange="reversed", type="category", automargin=True)
    plot.update_layout(template="plotly_white", height=total + 60)
    told.append("red: NaN, violet: infinite, blank: not measured")
    tell(plot, list(dict.fromkeys(filter(None, told))))
    return plot


def _heat_traces(
    reduced: Reduced, worst: FloatArray, scale: Scale, labels: Sequence[str], bar: dict[str, Any]
) -> list[Any]:
    from plotly.graph_objects import Heatmap

    names = [
        str(first) if first == last else f"{first} to {last}"
        for first, last in zip(reduced.first.tolist(), reduced.last.tolist(), strict=True)
    ]
    common = {"x": names, "y": list(labels), "xgap": 0, "ygap": 1 if len(labels) <= 80 else 0}
    strange = np.where(reduced.flags & NAN, 0.0, np.where(reduced.flags > FINITE, 1.0, np.nan))
    traces = [
        Heatmap(
            **common,
            z=np.where(np.isnan(strange), scale.apply(worst), np.nan),
            customdata=worst,
            zmin=scale.low,
            zmax=scale.high,
            colorscale=SIGNED if scale.kind == "symmetric" else MAGNITUDES,
            colorbar={"tickvals": scale.ticks, "ticktext": scale.labels, **bar},
            hovertemplate="%{y}<br>step %{x}: %{customdata:.4g}<extra></extra>",
        )
    ]
    if not np.isnan(strange).all():
        traces.append(
            Heatmap(
                **common,
                z=strange,
                zmin=0,
                zmax=1,
                colorscale=[(0, NAN_COLOUR), (1, INFINITY_COLOUR)],
                showscale=False,
                text=np.where(strange == 0, "NaN", "infinite"),
                hovertemplate="%{y}<br>step %{x}: %{text}<extra></extra>",
            )
        )
    return traces


def depths(run: Run, groups: Sequence[Group], log: bool | None) -> Figure:
    """A panel for each group: its values over the layers, at three steps.

    What an axis cannot show is marked on the upper edge, where no scale has to hold it.
    """
    from plotly.subplots import make_subplots

    plot = make_subplots(rows=len(groups), cols=1, subplot_titles=[group.name for group in groups])
    told = []
    for place, group in enumerate(groups, start=1):
        steps, values, measured = run.table(group.keys)
        places = np.flatnonzero(measured.any(axis=0))
        chosen = sorted(set(places[[0, len(places) // 2, -1]].tolist())) if len(places) else []
        logarithmic = is_logarithmic([values[:, chosen]]) if log is None else log
        for column, colour in zip(chosen, depth_colours(len(chosen)), strict=True):
            part, name = values[:, column], f"step {steps[column]}"
            seen = np.isfinite(part) & ((part > 0) | (not logarithmic))
            unseen = measured[:, column] & ~seen
            plot.add_scatter(
                x=list(group.labels),
                y=np.where(seen, part, np.nan),
                name=name,
                legendgroup=name,
                showlegend=place == 1,
                mode="lines+markers",
                line={"color": colour, "width": 1.6},
                marker={"size": 4},
                hovertemplate="%{x}: %{y:.4g}<extra>%{fullData.name}</extra>",
                row=place,
                col=1,
            )
            if unseen.any():
                told.append(f"{int(unseen.sum())} of {group.name} at {name}")
                plot.add_scatter(
                    x=[label for label, bad in zip(group.labels, unseen, strict=True) if bad],
                    y=[1.0] * int(unseen.sum()),
                    name=f"{name}: not drawn",
                    xaxis="x" if place == 1 else f"x{place}",
                    yaxis=f"y{len(groups) + place}",
                    mode="markers",
                    cliponaxis=False,
                    showlegend=False,
                    marker={"symbol": "x-thin-open", "size": 8, "color": NAN_COLOUR},
                    text=[f"{value:.4g}" for value in part[unseen]],
                    hovertemplate="%{x}: %{text}<extra>%{fullData.name}</extra>",
                )
        plot.update_yaxes(type="log" if logarithmic else "linear", row=place, col=1)
    for place in range(1, len(groups) + 1):
        overlaid = "y" if place == 1 else f"y{place}"
        plot.update_layout({f"yaxis{len(groups) + place}": marks_axis(overlaid, place)})
    plot.update_xaxes(type="category", categoryorder="trace", nticks=30, automargin=True)
    plot.update_yaxes(exponentformat="e", selector={"overlaying": None})
    plot.update_layout(template="plotly_white", height=120 + 380 * len(groups))
    if told:
        more = f" and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
        what = f"{', '.join(told[:_MOST_TOLD])}{more}"
        tell(plot, [f"marked at the upper edge, as the axis cannot show them: {what}"])
    return plot
