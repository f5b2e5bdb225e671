"""Layers whose scale is out of line with the others before anything was learned."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Severity, number
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.layers import Layer, is_input, is_output, is_parameter, layers_of
from tmm.analysis.recent import Newest
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded


def initial_scales(
    recorded: Recorded,
    *,
    gain: float = 8.0,
    high: float = 30.0,
    apart: float = 5.0,
    growth: float = 2.5,
    decay: float = 1 / 30,
    small: float = 1 / 200,
    tiny: float = 1 / 2000,
    layers: int = 3,
) -> Iterator[Anomaly]:
    """Layers that multiply the size of their input in the first recorded step.

    The gain of a layer is the root mean square of its output over that of what came before it.
    Usual initialisations give 0.1 to 2. One layer (``initialisation``): a gain above ``gain``, and
    gain and weights each ``apart`` times the median of the other layers: medium, above ``high``
    high; weights below ``small`` of the others' median: low, ``tiny`` medium. All
    (``signal_growth``, ``signal_decay``), of at least ``layers`` layers: the median of the
    gains is above ``growth`` (high), or below ``decay`` (medium). Layers whose weights begin at
    one, as those of normalisations, are left out, and those that are zero or of which the first
    update left nothing to know.
    """
    found = [layer for layer in layers_of(recorded) if not layer.is_normalisation]
    found = [layer for layer in found if len(layer.weight.values) and len(layer.output.values)]
    found = [layer for layer in found if layer.first > 0]
    gains = np.array([layer.gain for layer in found])
    weights = np.array([layer.first for layer in found])
    known = np.isfinite(gains) & (gains > 0)
    if not len(found):
        return
    middle = float(np.median(gains[known])) if known.any() else 1.0
    if known.sum() >= layers and middle > growth:
        yield _of_all(found, gains, middle, "signal_growth", "high", growth)
        return
    if known.sum() >= layers and middle < decay:
        yield _of_all(found, gains, middle, "signal_decay", "medium", decay)
    for place in range(len(found)):
        others = np.delete(weights, place)
        if not len(others):
            continue
        rest = np.delete(gains, place)[np.delete(known, place)]
        usual, typical = float(np.median(others)), float(np.median(rest)) if len(rest) else 1.0
        own, times = float(gains[place]), float(weights[place] / usual)
        severity: Severity
        if own > gain and own > apart * typical and times > apart:
            severity = "high" if own > high else "medium"
        elif times < small:
            severity = "medium" if times < tiny else "low"
        else:
            continue
        yield _of_one(found[place], own, times, severity, gain)


def _of_one(layer: Layer, gain: float, times: float, severity: Severity, limit: float) -> Anomaly:
    size = "large" if times > 1 else "small"
    text = f"{layer.name} begins with weights {number(times)} times those of the other layers"
    if np.isfinite(gain):
        text += f" (the median), and its output has {number(gain)} times the size of its input"
    text += f": it is initialised too {size}."
    step = int(layer.output.steps[0])
    return Anomaly(
        *("initialisation", severity, step, step, layer.output.key, layer.name),
        *(gain, limit, text),
    )


def _of_all(
    found: list[Layer],
    gains: np.ndarray,
    middle: float,
    kind: str,
    severity: Severity,
    limit: float,
) -> Anomaly:
    first = next(layer for layer, value in zip(found, gains, strict=True) if np.isfinite(value))
    step = int(first.output.steps[0])
    what = (
        "the initialisation is too large, or normalisations are missing"
        if middle > 1
        else "signals vanish on their way (the initialisation is too small)"
    )
    text = (
        f"At step {step} a layer gives {number(middle)} times the size of its input (the median of"
        f" {int(np.isfinite(gains).sum())} layers with weights): {what}."
    )
    return Anomaly(
        *(kind, severity, step, step, first.output.key, first.name, middle, limit, text),
    )


def _is_of_scale(info: KeyInfo) -> bool:
    return is_output(info) or is_parameter(info) or is_input(info)


def _first_values(newest: Newest) -> Ending:
    is_first = bool(len(newest)) and len(newest.series(0).values) == 1
    return Ending.of(newest, np.full(len(newest), is_first, dtype=np.bool_))


def _one(info: KeyInfo) -> int:
    return 0


def _is_input_count(info: KeyInfo) -> bool:
    return info.kind == "model_input"


SCALES_END = (
    EndsWith("initialisation", "high", _is_of_scale, _first_values, _one, _is_input_count),
)
