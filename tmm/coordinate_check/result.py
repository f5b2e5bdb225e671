"""What a coordinate check found, as a table and as a picture."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tmm.core.metrics import FloatArray

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Term: TypeAlias = Literal["(W_t-W_0)x_t", "W_0(x_t-x_0)", "activation"]

TERMS: tuple[Term, ...] = ("(W_t-W_0)x_t", "W_0(x_t-x_0)", "activation")
"""What a layer's own weights did to its output, what its changed input did, and the output."""

_PLOT_SUFFIXES = (".html", ".png")


@dataclass(frozen=True)
class PowerLaw:
    """The fit of size = constant * width ** exponent, with a constant for each seed.

    ``standard_error`` is that of the exponent, from the scatter of the points around their lines;
    NaN for two widths and one seed, which leave none. Both are NaN where a size has no finite
    logarithm.
    """

    exponent: float
    standard_error: float


def fit_power_law(widths: Sequence[int], sizes: npt.ArrayLike) -> PowerLaw:
    """Fit ``sizes``, of shape (widths, seeds), with parallel lines, one for each seed."""
    points: FloatArray = np.asarray(sizes, dtype=np.float64)
    if not (np.isfinite(points).all() and (points > 0).all()):
        return PowerLaw(math.nan, math.nan)
    # A seed has the same data at every width, so its points lie high or low together.
    y = np.log(points)
    y = y - y.mean(axis=0)
    x = np.log(np.asarray(widths, dtype=np.float64))
    x = np.broadcast_to((x - x.mean())[:, None], y.shape)
    spread = float((x**2).sum())
    exponent = float((x * y).sum()) / spread
    degrees = y.size - y.shape[1] - 1
    if degrees == 0:
        return PowerLaw(exponent, math.nan)
    variance = float(((y - exponent * x) ** 2).sum()) / degrees
    return PowerLaw(exponent, math.sqrt(variance / spread))


def geometric_means(sizes: npt.ArrayLike) -> tuple[float, ...]:
    """The mean over seeds that lies on the fitted scale; 0 where a size is 0, NaN where it is."""
    with np.errstate(divide="ignore", invalid="ignore"):
        means = np.exp(np.log(np.asarray(sizes, dtype=np.float64)).mean(axis=1))
    return tuple(float(mean) for mean in means)


@dataclass(frozen=True)
class Growth:
    """How one term of one layer grows with width.

    Attributes:
        layer: dotted name of the module.
        term: one of ``TERMS``.
        sizes: size of a coordinate at each width, the geometric mean over the seeds.
        exponent: of width, in the fitted power law; NaN where there is none, see ``note``.
        standard_error: of the exponent, from the scatter over widths and seeds; NaN for two points.
        note: why there is no exponent; empty otherwise.
    """

    layer: str
    term: Term
    sizes: tuple[float, ...]
    exponent: float
    standard_error: float
    note: str = ""

    @staticmethod
    def of(layer: str, term: Term, widths: Sequence[int], sizes: npt.ArrayLike) -> Growth:
        """Fit ``sizes``, of shape (widths, seeds)."""
        law = fit_power_law(widths, sizes)
        means = geometric_means(sizes)
        note = _note(widths, np.asarray(sizes, dtype=np.float64))
        return Growth(layer, term, means, law.exponent, law.standard_error, note)

    @property
    def exponent_text(self) -> str:
        """The exponent with its standard error, or the note."""
        if self.note:
            return self.note
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.2f}"
        return f"{self.exponent:+.2f}{error}"


@dataclass(frozen=True)
class CoordinateCheck:
    """What ``tmm.coord_check`` found; ``str`` of it is a table.

    Attributes:
        widths: the widths, rising.
        seeds: number of seeds.
        steps: number of optimizer steps before the measurement.
        growths: a row per layer and term, layers in order of execution within each term.
        unmeasured: chosen layers without rows, with the reason.
    """

    widths: tuple[int, ...]
    seeds: int
    steps: int
    growths: tuple[Growth, ...]
    unmeasured: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        """The measured layers, in order of execution."""
        return tuple(dict.fromkeys(growth.layer for growth in self.growths))

    def exponents(self, term: Term) -> dict[str, float]:
        """The exponent of each layer that has one.

        Raises:
            ValueError: if there is no such term.
        """
        if term not in TERMS:
            raise ValueError(f"term={term!r} is none of {', '.join(map(repr, TERMS))}")
        found = (growth for growth in self.growths if growth.term == term and not growth.note)
        return {growth.layer: growth.exponent for growth in found}

    def __str__(self) -> str:
        lines = [self.summary]
        name_size = max((len(layer) for layer in self.layers), default=0)
        for term in TERMS:
            rows = [growth for growth in self.growths if growth.term == term]
            if not rows:
                continue
            name_size = max(name_size, len(term))
            widths = "".join(f"{width:>11}" for width in self.widths)
            lines += ["", f"{term:<{name_size}}{widths}  exponent"]
            for row in rows:
                sizes = "".join(f"{size:>11.3g}" for size in row.sizes)
                lines.append(f"{row.layer:<{name_size}}{sizes}  {row.exponent_text}")
        if self.unmeasured:
            lines += ["", "not measured:"]
            lines += [f"    {layer}: {reason}" for layer, reason in self.unmeasured.items()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from tmm.views.report.card import card, lines_of

        rows: dict[str, list[str]] = {}
        for growth in self.growths:
            rows.setdefault(growth.layer, []).append(f"{growth.term}: {growth.exponent_text}")
        left_out = {f"not measured: {len(self.unmeasured):,}": lines_of(self.unmeasured)}
        return card(
            self.summary,
            [(layer, "; ".join(texts)) for layer, texts in rows.items()],
            left_out if self.unmeasured else {},
        )

    @property
    def summary(self) -> str:
        """One line: what was measured, and when."""
        return (
            f"Size of a coordinate by width after {_number(self.steps, 'step')},"
            f" geometric mean of {_number(self.seeds, 'seed')}"
        )

    def plot(self, title: str | None = None) -> Figure:
        """A plotly figure: a panel per term, a line per layer, logarithmic axes.

        Raises:
            ImportError: if plotly is not installed, naming what to install.
        """
        from tmm.coordinate_check.plot import figure

        return figure(self, title)

    def save(self, path: str | os.PathLike[str], title: str | None = None) -> tuple[Path, ...]:
        """Write the plot as a picture and as a page that needs nothing else.

        Args:
            path: ends in ``.png`` or ``.html`` for one of them; without such an ending both are
                written, with these endings added. Its folder is made if need be.
            title: heading of the plot.

        Returns:
            The files written.

        Raises:
            ImportError: if plotly, or kaleido for the picture, is not installed.
            RuntimeError: if kaleido finds no Chrome or Chromium to draw the picture with.
            OSError: if the files cannot be written.
        """
        from tmm.coordinate_check.plot import write

        target = Path(path)
        if target.suffix in _PLOT_SUFFIXES:
            targets = [target]
        else:
            targets = [target.with_name(target.name + suffix) for suffix in _PLOT_SUFFIXES]
        target.parent.mkdir(parents=True, exist_ok=True)
        for each in targets:
            write(self.plot(title), each)
        return tuple(targets)


def _note(widths: Sequence[int], sizes: npt.NDArray[np.float64]) -> str:
    problems = {"not finite": ~np.isfinite(sizes), "zero": sizes == 0}
    for problem, there in problems.items():
        places = [str(width) for width, row in zip(widths, there, strict=True) if row.any()]
        if len(places) == len(widths):
            return f"{problem} at every width"
        if places:
            return f"{problem} at width {', '.join(places)}"
    return ""


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
