"""The looks that all pictures share."""

from __future__ import annotations

from importlib.util import find_spec

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
