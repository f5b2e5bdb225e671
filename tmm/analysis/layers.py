"""The layers of a model that have weights, in the order of execution, with what goes in and out."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import numpy as np

from tmm.analysis.series import Series, is_metric, series_of
from tmm.core.families import ACTIVATION, MODEL_INPUT
from tmm.core.keys import layer_of
from tmm.core.series_by_key import Recorded

_ONE = 0.1  # how far the root mean square of gains may be from 1 after the first step

is_update = is_metric("update", "relative_norm")
is_parameter = is_metric("parameter", "rms")
is_output = is_metric("activation", "rms")
is_input = is_metric(MODEL_INPUT.name, "rms")


@dataclass(frozen=True, eq=False)
class Layer:
    """A module with a weight: series of the root mean squares of its input, output and weight.

    ``source`` is what was computed just before its output: its input in most models. The first
    layer has the input of the model, None where that is no tensor of real numbers.
    """

    name: str
    source: Series | None
    output: Series
    weight: Series

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
    def is_normalisation(self) -> bool:
        """Whether its weight begins at one, as gains of normalisations do."""
        return begins_at_one(self.weight)


def begins_at_one(weight: Series) -> bool:
    """Whether a parameter is one at first, but for what the first step changes."""
    return bool(len(weight.values) and abs(weight.values[0] - 1.0) < _ONE)


def is_bias(site: str) -> bool:
    """Whether a parameter moves about zero, by its name."""
    return "bias" in site.rpartition(".")[2]


def layers_of(recorded: Recorded) -> list[Layer]:
    """The layers with weights and outputs that were measured."""
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
            found.append(Layer(name, before, series, weights.pop(name)))
        before = series
    return found


def has_activation(recorded: Recorded) -> set[str]:
    """The modules whose outputs were measured."""
    names = map(recorded.key_info, recorded.keys())
    return {layer_of(info) for info in names if info.kind == ACTIVATION.name}


def trained(recorded: Recorded) -> list[Series]:
    """The sizes of updates of parameters, relative to these, but for those that move about zero."""
    return [series for series in series_of(recorded, is_update) if not is_bias(series.site)]


def gap_of(series: Series) -> float:
    """How many steps lie between two recorded ones, as a rule."""
    return float(median(np.diff(series.steps).tolist())) if len(series.steps) > 1 else 1.0


def joined(parts: list[Series]) -> tuple[np.ndarray, np.ndarray]:
    """All steps, shape (n,), and the values at them, (parts, n); NaN where there is none."""
    steps = np.unique(np.concatenate([part.steps for part in parts]))
    return steps, np.array([part.on(steps) for part in parts])
