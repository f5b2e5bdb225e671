"""The layers of a model that have weights, in the order of execution, with what goes in and out."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

from tmm.analysis.series import Series, is_metric, series_of
from tmm.core.families import ACTIVATION, MODEL_INPUT
from tmm.core.keys import layer_of
from tmm.core.series_by_key import Recorded

_ONE, _NEAR = 0.1, 0.35  # how far what is 1 may be from it, known well and less well
_LITTLE, _MUCH = 0.3, 3.0  # of an update, which may be added to a weight or taken off

is_update = is_metric("update", "relative_norm")
is_parameter = is_metric("parameter", "rms")
is_output = is_metric("activation", "rms")
is_input = is_metric(MODEL_INPUT.name, "rms")


@dataclass(frozen=True, eq=False)
class Layer:
    """A module with a weight: series of the root mean squares of its input, output and weight.

    Its first update changed the weight by ``moved`` of its norm; 0 where none was measured.

    ``source`` is what was computed just before its output: its input in most models. The first
    layer has the input of the model, None where that is no tensor of real numbers.
    """

    name: str
    source: Series | None
    output: Series
    weight: Series
    moved: float

    @property
    def gain(self) -> float:
        """Output over input at the first step of both; NaN where it is not known."""
        if self.source is None:
            return float("nan")
        there = np.intersect1d(self.source.steps, self.output.steps)[:1]
        if not len(there):
            return float("nan")
        into, out = self.source.on(there)[0], self.output.on(there)[0]
        return float(out / into) if into > 0 and np.isfinite(out) else float("nan")

    @property
    def first(self) -> float:
        """The root mean square of its weight before the first update; NaN where it is not known."""
        return first_size(self.weight, self.moved)

    @property
    def is_normalisation(self) -> bool:
        """Whether weight and output both begin at one, as those of normalisations do."""
        size = float(self.output.values[0]) if len(self.output.values) else float("nan")
        return begins_at_one(self.weight, self.moved) and abs(size - 1.0) < _NEAR


def first_size(weight: Series, moved: float) -> float:
    """The size of a parameter before its first update, which changed it by ``moved`` of its norm.

    Parameters are measured after the update. One that changed little is what it was, and of one
    that became many times as large the update is all. NaN in between.
    """
    if not len(weight.values) or not _LITTLE <= moved <= _MUCH:
        after = float(weight.values[0]) if len(weight.values) else float("nan")
        return after if not moved >= _LITTLE else after / moved
    return float("nan")


def begins_at_one(weight: Series, moved: float) -> bool:
    """Whether a parameter is one at first."""
    tolerance = _ONE if moved < _ONE else _NEAR
    return abs(first_size(weight, moved) - 1.0) < tolerance


def first_moves(recorded: Recorded) -> dict[str, float]:
    """How far the first update changed each parameter, as a part of its norm."""
    series = series_of(recorded, is_update)
    return {s.site: float(s.values[0]) for s in series if len(s.values)}


def is_bias(site: str) -> bool:
    """Whether a parameter moves about zero, by its name."""
    return "bias" in site.rpartition(".")[2]


def layers_of(recorded: Recorded) -> list[Layer]:
    """The layers with weights and outputs that were measured."""
    moves = first_moves(recorded)
    weights: dict[str, Series] = {}
    for series in series_of(recorded, is_parameter):
        module, _, name = series.site.rpartition(".")
        if "weight" in name:
            weights.setdefault(module, series)
    floats = {  # counts are of real numbers only
        info.site
        for info in map(recorded.key_info, recorded.keys())
        if info.kind == MODEL_INPUT.name and info.key.endswith("/nan_count")
    }
    inputs = [series for series in series_of(recorded, is_input) if series.site in floats]
    before: Series | None = inputs[0] if len(inputs) == 1 else None
    found = []
    for series in series_of(recorded, is_output):
        name = layer_of(series.info)
        if name in weights:
            weight = weights.pop(name)
            found.append(Layer(name, before, series, weight, moves.get(weight.site, 0.0)))
        before = series
    return found


def has_activation(recorded: Recorded) -> set[str]:
    """The modules whose outputs were measured."""
    names = map(recorded.key_info, recorded.keys())
    return {layer_of(info) for info in names if info.kind == ACTIVATION.name}


def trained(recorded: Recorded) -> list[Series]:
    """The sizes of updates of parameters, relative to these, but for those that move about zero."""
    found = series_of(recorded, is_update)
    return [series for series in found if len(series.steps) and not is_bias(series.site)]


def gap_of(series: Series) -> float:
    """How many steps lie between two recorded ones, as a rule."""
    return float(median(np.diff(series.steps).tolist())) if len(series.steps) > 1 else 1.0


def joined(parts: list[Series]) -> tuple[np.ndarray, np.ndarray]:
    """All steps, shape (n,), and the values at them, (parts, n); NaN where there is none."""
    steps = np.unique(np.concatenate([part.steps for part in parts]))
    return steps, np.array([part.on(steps) for part in parts])
