"""A series as one line of text."""

from __future__ import annotations

import math

import numpy as np

from tmm.core.metrics import FloatArray

_BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(values: FloatArray, width: int, *, log: bool = False) -> str:
    """Values as a line of blocks, the mean of each part; ``!`` where one is not finite."""
    if not len(values):
        return ""
    # Invalid: infinities of both signs in one part.
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = np.array_split(np.log10(values) if log else values, min(width, len(values)))
        # Rounding must not make a step of a series that stands still.
        means = np.array(
            [np.clip((part / len(part)).sum(), part.min(), part.max()) for part in parts]
        )
    finite = means[np.isfinite(means)] / 2  # halves, whose difference does not overflow
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 0.0)
    line = ""
    for mean in means:
        if not math.isfinite(mean):
            line += "!"
            continue
        height = (mean / 2 - low) / (high - low) if high > low else 0.5
        line += _BLOCKS[min(int(height * len(_BLOCKS)), len(_BLOCKS) - 1)]
    return line
