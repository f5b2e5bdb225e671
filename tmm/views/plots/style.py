"""What all pictures share: their looks, axes that are marked, and how they become files."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tmm.core.metrics import FloatArray

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

RUN_COLOURS = (
    "#2f74d0",
    "#d9730d",
    "#1c9a6c",
    "#b8439c",
    "#7b5bd6",
    "#a3851b",
    "#d1495b",
    "#4d8a9b",
)
"""One for each run, or series, in turn; all are seen on white and on near black."""

NAN_COLOUR, INFINITY_COLOUR = "#e5002b", "#d400d4"
"""Of what is not finite; no scale of colours has them."""

MAGNITUDES = "Viridis"
"""The scale of colours for values without sign."""

SIGNED = (
    (0.0, "#2166ac"),
    (0.25, "#8fbcd8"),
    (0.5, "#f2f2f2"),
    (0.75, "#e8b48c"),
    (1.0, "#8c510a"),
)
"""The scale of colours for values with a sign, zero in the middle; without red, which is NaN's."""

DEPTH = "Turbo"
"""The scale of colours for layers, from the input to the output, without its ends."""

_LOG_RANGE = 30.0

IMAGES = (".png", ".svg", ".pdf")
ENDINGS = (".html", *IMAGES)

_WIDTH, _HEIGHT = 1000, 600  # pixels
OFFLINE = {"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""}
"""Settings of plotly for pages that send nothing anywhere."""


def require_package(package: str, what: str) -> None:
    """Raise ImportError, naming the remedy, unless a package of the extra ``plot`` is there."""
    if find_spec(package) is None:
        raise ImportError(f"{what} needs {package}: pip install 'tmm-compile[plot]'")


def depth_colours(count: int) -> list[str]:
    """One colour for each of ``count`` layers, in their order."""
    from plotly.colors import sample_colorscale

    places = [0.1 + 0.8 * index / max(1, count - 1) for index in range(count)]
    colours: list[str] = sample_colorscale(DEPTH, places)
    return colours


def magnitude_colours(count: int = 17) -> list[tuple[float, str]]:
    """The scale of colours for values without sign, as places from 0 to 1 and their colours."""
    from plotly.colors import sample_colorscale

    places = [index / (count - 1) for index in range(count)]
    return list(zip(places, sample_colorscale(MAGNITUDES, places), strict=True))


def is_logarithmic(parts: Sequence[FloatArray]) -> bool:
    """Whether all finite values are positive, and of several orders of magnitude."""
    finite = [part[np.isfinite(part)] for part in parts]
    lows = [float(part.min()) for part in finite if part.size]
    highs = [float(part.max()) for part in finite if part.size]
    return bool(lows) and min(lows) > 0 and max(highs) / _LOG_RANGE > min(lows)


def marks_axis(overlaid: str, place: int) -> dict[str, Any]:
    """An axis over that of a panel, from its lower edge to its upper one."""
    return {
        "overlaying": overlaid,
        "anchor": "x" if place == 1 else f"x{place}",
        "range": [0, 1],
        "fixedrange": True,
        "visible": False,
    }


def tell(plot: Figure, told: Sequence[str]) -> None:
    """Say under the title what a picture leaves out or marks."""
    if told:
        plot.update_layout(title={"text": f"<sub>{'; '.join(told)}.</sub>", "x": 0.01})


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a page that holds all it needs, or as an image, by the ending of ``path``.

    Raises ValueError for another ending, ImportError, naming the remedy, for images without
    kaleido, and OSError.
    """
    if path.suffix == ".html":
        figure.write_html(path, include_plotlyjs=True, config=OFFLINE)
    elif path.suffix in IMAGES:
        require_package("kaleido", "an image of a figure")
        figure.write_image(path, width=_WIDTH, height=figure.layout.height or _HEIGHT)
    else:
        raise ValueError(f"cannot write {str(path)!r}: write a .html, .png, .svg or .pdf file")
