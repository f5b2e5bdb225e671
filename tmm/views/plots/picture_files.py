"""Figures as files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tmm.views.plots.style import require_package

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

IMAGES = (".png", ".svg", ".pdf")
ENDINGS = (".html", *IMAGES)

_WIDTH, _HEIGHT = 1000, 600  # pixels
OFFLINE = {"displaylogo": False, "showSendToCloud": False, "plotlyServerURL": ""}
"""Settings of plotly for pages that send nothing anywhere."""


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
