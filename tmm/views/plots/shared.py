"""What figures of all kinds share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tmm.core.metrics import FloatArray

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_LOG_RANGE = 30.0


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
