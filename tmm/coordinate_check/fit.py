"""The exponent of a power law, by least squares on logarithms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tmm.core.metrics import FloatArray


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
