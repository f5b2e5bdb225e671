"""Private: pictures of runs: series, heat maps of layers over steps, values over depth."""

from tmm.views.plots.figures import FIGURE_KINDS, FigureKind, figure
from tmm.views.plots.style import write_figure

__all__ = ["FIGURE_KINDS", "FigureKind", "figure", "write_figure"]
