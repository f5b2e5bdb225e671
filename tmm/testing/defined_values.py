"""What metrics are by their definitions, in float64, and whether numbers agree with them.

Written from the documentation alone: nothing of tmm is used, so that an error of its arithmetic
cannot hide behind the same error here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float64]

EXTREMES = ("absmax", "min", "max")
ORDERED = ("mean", "min", "max")
COUNTS = ("nan_count", "inf_count")
AVERAGES = ("mean", "std", "rms", "norm", "mean_abs", "zero_fraction", "kurtosis")
BUILTIN = (*AVERAGES, *EXTREMES, *COUNTS, "histogram")

_POWERS = [2.0**exponent for exponent in range(-40, 17)]
EDGES = np.array([-math.inf, *(-p for p in reversed(_POWERS)), *_POWERS, math.inf])


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Relative errors allowed: of minima and maxima, and of everything else."""

    other: float
    extreme: float

    def of(self, metric: str) -> float:
        """The relative error that a metric may have."""
        if metric in COUNTS:
            return 0.0
        return self.extreme if metric in EXTREMES else self.other


@dataclasses.dataclass(frozen=True, eq=False)
class Expected:
    """A value and what its error is relative to; ``data`` are the numbers behind a histogram."""

    value: float | FloatArray
    scale: float
    data: FloatArray | None = None


def expected_values(data: FloatArray) -> dict[str, Expected]:
    """Every built-in metric of some numbers, and what its error is relative to."""
    expected = {name: Expected(value, abs(value)) for name, value in builtin_values(data).items()}
    # A mean is as exact as the numbers that it is taken of.
    expected["mean"] = Expected(expected["mean"].value, float(expected["mean_abs"].value))
    return expected | {"histogram": Expected(histogram(data), 0.0, data)}


def as_numbers(values: object) -> FloatArray:
    """All elements as real numbers; of complex ones their absolute values."""
    tensor = torch.as_tensor(values)
    tensor = tensor.abs() if tensor.is_complex() else tensor
    return tensor.to(torch.float64).reshape(-1).numpy()


def builtin_values(data: FloatArray) -> dict[str, float]:
    """Every scalar built-in metric, by its definition, in float64."""
    with np.errstate(all="ignore"):
        deviation = data - data.mean()
        second = np.mean(deviation**2)
        constant = math.isfinite(data.min()) and data.min() == data.max()
        values = {
            "mean": data.mean(),
            "std": np.sqrt(np.sum(deviation**2) / np.float64(data.size - 1)),
            "rms": np.sqrt(np.mean(data**2)),
            "norm": np.sqrt(np.sum(data**2)),
            "mean_abs": np.abs(data).mean(),
            "absmax": np.abs(data).max(),
            "min": data.min(),
            "max": data.max(),
            "zero_fraction": np.mean(data == 0),
            "kurtosis": math.nan if constant else np.mean(deviation**4) / second**2,
        }
    if constant and data.size > 1:
        values["std"] = 0.0
    if np.isnan(data).any():
        values = dict.fromkeys(values, math.nan)
    values["nan_count"] = np.isnan(data).sum()
    values["inf_count"] = np.isinf(data).sum()
    return {name: float(value) for name, value in values.items()}


def histogram(data: FloatArray) -> FloatArray:
    """Counts per bin: ``[edge, next edge)``, the last one with +inf; NaN is in none."""
    numbers = data[~np.isnan(data)]
    bins = np.searchsorted(EDGES, numbers, side="right") - 1
    return np.bincount(np.minimum(bins, len(EDGES) - 2), minlength=len(EDGES) - 1).astype(float)


def disagreements(
    got: Mapping[str, float | FloatArray], want: Mapping[str, Expected], allowed: Tolerance
) -> list[str]:
    """A line for each key that is missing, superfluous or wrong; the worst first."""
    missing = [f"missing: {key}" for key in want if key not in got]
    extra = [f"superfluous: {key} = {got[key]}" for key in got if key not in want]
    wrong: list[tuple[float, str]] = []
    for key, expected in want.items():
        if key not in got:
            continue
        limit = allowed.of(re.findall(r"\w+", key)[-1])
        if expected.data is None:
            error = _relative_error(float(got[key]), float(expected.value), expected.scale)
            description = f"{key}: got {got[key]!r}, want {expected.value!r}"
        else:
            error = _misplaced(np.asarray(got[key]), expected.data, limit)
            description = f"{key}: {error:.0f} elements in the wrong bins"
            error /= max(1, expected.data.size)
        if not error <= limit:
            wrong.append((error, f"{description} (error {error:.1e}, allowed {limit:.0e})"))
    return missing + extra + [line for _, line in sorted(wrong, reverse=True)]


def _relative_error(got: float, want: float, scale: float) -> float:
    if got == want or (math.isnan(got) and math.isnan(want)):
        return 0.0
    error = abs(got - want) / scale if scale else math.inf
    return math.inf if math.isnan(error) else error


def _misplaced(got: FloatArray, data: FloatArray, limit: float) -> float:
    """How many elements lie in bins that no change of each by ``limit`` could bring them to.

    The change is relative to the element or to the site's root mean square, as rounding is.
    """
    numbers = np.sort(data[~np.isnan(data)])
    if got.shape != (len(EDGES) - 1,) or got.sum() != numbers.size:
        return math.inf
    finite = numbers[np.isfinite(numbers)]
    size = math.sqrt(np.mean(finite**2)) if finite.size else 0.0
    inner = EDGES[1:-1]
    below = np.cumsum(got)[:-1]
    margin = limit * np.maximum(np.abs(inner), size)
    fewest = np.searchsorted(numbers, inner - margin, side="left")
    most = np.searchsorted(numbers, inner + margin, side="left")
    return float(np.maximum(fewest - below, below - most).clip(min=0).max())
