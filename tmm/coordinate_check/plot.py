"""The picture of a coordinate check, drawn by plotly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tmm.coordinate_check.result import TERMS, CoordinateCheck
from tmm.views.plots.style import OFFLINE, require_package

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

WHAT = "the plot of a coordinate check"  # that needs packages
_HEIGHT, _WIDTH = 560, 1240  # pixels
_HEIGHT_PER_LAYER = 21  # of the legend
_TITLES = {
    "(W_t-W_0)x_t": "(W<sub>t</sub> - W<sub>0</sub>) x<sub>t</sub>",
    "W_0(x_t-x_0)": "W<sub>0</sub> (x<sub>t</sub> - x<sub>0</sub>)",
    "activation": "activation",
}


def figure(check: CoordinateCheck, title: str | None) -> Figure:
    """A panel per term, a line per layer; sizes share one axis, so that panels compare.

    Sizes that are zero or not finite are left out.
    """
    require_package("plotly", WHAT)
    from plotly.colors import sample_colorscale
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    layers = check.layers
    positions = [index / max(1, len(layers) - 1) for index in range(len(layers))]
    colours = dict(zip(layers, sample_colorscale("Turbo", positions), strict=True))
    plot = make_subplots(
        rows=1,
        cols=len(TERMS),
        shared_yaxes=True,
        horizontal_spacing=0.02,
        subplot_titles=[_TITLES[term] for term in TERMS],
    )
    in_legend: set[str] = set()
    for growth in check.growths:
        points = [
            (width, size)
            for width, size in zip(check.widths, growth.sizes, strict=True)
            if 0 < size < float("inf")
        ]
        if not points:
            continue
        layer = growth.layer
        line = Scatter(
            x=[width for width, _ in points],
            y=[size for _, size in points],
            name=layer,
            legendgroup=layer,
            showlegend=layer not in in_legend,
            mode="lines+markers",
            line={"color": colours[layer], "width": 1.5},
            marker={"size": 5},
            hovertemplate=f"{layer}<br>width %{{x}}: %{{y:.3g}}<br>"
            f"exponent {growth.exponent_text}<extra></extra>",
        )
        plot.add_trace(line, row=1, col=TERMS.index(growth.term) + 1)
        in_legend.add(layer)
    plot.update_xaxes(
        type="log",
        tickvals=check.widths,
        ticktext=[str(width) for width in check.widths],
        title="width",
    )
    plot.update_yaxes(type="log", dtick="D2", tickformat="~g")
    plot.update_yaxes(title="size of a coordinate", col=1)
    heading = check.summary if title is None else f"{title}<br><sub>{check.summary}</sub>"
    plot.update_layout(
        title=heading,
        template="plotly_white",
        width=_WIDTH,
        height=max(_HEIGHT, 200 + _HEIGHT_PER_LAYER * len(layers)),
        hovermode="closest",
        legend={"tracegroupgap": 0},
        margin={"t": 130},
    )
    return plot


def write(plot: Figure, path: Path) -> None:
    """Write ``plot`` as HTML that holds all it needs, or as PNG, by the ending of ``path``."""
    if path.suffix == ".html":
        plot.write_html(path, include_plotlyjs=True, config=OFFLINE)
    else:
        require_package("kaleido", WHAT)
        plot.write_image(path, scale=2)
