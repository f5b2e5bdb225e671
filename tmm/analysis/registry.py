"""Which detectors there are, and all that they find in a record."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TypeAlias

import numpy as np

from tmm.analysis.anomaly import SEVERITIES, Anomaly
from tmm.analysis.detectors import (
    activations,
    attention,
    dead_units,
    differing_replicas,
    gradient_norms,
    gradients,
    initialisation,
    learning_rate,
    loss,
    memory,
    model_inputs,
    nonfinite_values,
    not_trained,
    saturation,
    untied,
    updates,
    weights,
)
from tmm.analysis.ending import EndsWith
from tmm.analysis.recorded import ReadOnce
from tmm.core.failures import levels_to_user
from tmm.core.series_by_key import Recorded

Detector: TypeAlias = Callable[[Recorded], Iterable[Anomaly]]

GROUP = "tmm.detectors"
"""The group of entry points under which other packages offer detectors."""

ENDINGS: Mapping[Detector, tuple[EndsWith, ...]] = {
    nonfinite_values.nonfinite: (),
    gradients.exploding_gradients: gradients.EXPLOSIONS_END,
    gradients.vanishing_gradients: gradients.VANISHING_ENDS,
    gradients.idle_parameters: gradients.IDLE_ENDS,
    loss.loss_spikes: loss.SPIKES_END,
    loss.loss_drops: loss.DROPS_END,
    loss.loss_divergence: loss.DIVERGENCES_END,
    loss.loss_plateaus: loss.PLATEAUS_END,
    dead_units.dead_units: dead_units.DEATHS_END,
    attention.collapsed_attention: attention.COLLAPSES_END,
    attention.growing_logits: attention.LOGITS_END,
    activations.activation_outliers: activations.OUTLIERS_END,
    activations.exploding_activations: activations.EXPLOSIONS_END,
    updates.large_updates: updates.LARGE_END,
    updates.small_updates: updates.SMALL_END,
    memory.growing_memory: memory.GROWTH_ENDS,
}
"""The detectors that judge each series by itself, and with which newest values their episodes end.

That of NaN and infinity is asked otherwise: see `nonfinite_values.nonfinite_at`."""

JOINT_ENDINGS: Mapping[Detector, tuple[EndsWith, ...]] = {
    attention.attention_sinks: attention.SINKS_END,
    model_inputs.strange_inputs: model_inputs.JUMPS_END,
    model_inputs.input_scales: model_inputs.SCALE_ENDS,
    model_inputs.repeated_data: model_inputs.REPEATS_END,
    initialisation.initial_scales: initialisation.SCALES_END,
    not_trained.untrained_parameters: not_trained.UNTRAINED_END,
    not_trained.skipped_optimizer_steps: not_trained.SKIPS_END,
    not_trained.optimizer_resets: not_trained.RESETS_END,
    differing_replicas.replicas_that_differ: differing_replicas.REPLICAS_END,
    learning_rate.large_rates: learning_rate.RATES_END,
    learning_rate.small_rates: learning_rate.STANDSTILL_ENDS,
    weights.decaying_parameters: weights.DECAY_ENDS,
    weights.jumping_parameters: weights.WRITES_END,
    untied.untied_parameters: untied.UNTYING_ENDS,
    saturation.saturated_units: saturation.SATURATION_ENDS,
    saturation.alike_outputs: saturation.COLLAPSE_ENDS,
    gradient_norms.clipped_gradients: gradient_norms.CLIPS_END,
    gradient_norms.multiplied_gradients: gradient_norms.FACTOR_ENDS,
    gradient_norms.lost_gradients: gradient_norms.LOSS_ENDS,
}
"""Those that judge several series together, and when an alert asks them: some not in each step."""

BUILT_IN: tuple[tuple[str, Detector], ...] = tuple(
    (detector.__name__, detector) for detector in (*ENDINGS, *JOINT_ENDINGS)
)
"""The same with their names."""


def all_detectors() -> tuple[tuple[str, Detector], ...]:
    """The built-in detectors with their names, and those of other packages.

    An entry point of the group ``tmm.detectors`` that cannot be loaded is warned of and left out.
    """
    found = list(BUILT_IN)
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        try:
            detector = entry.load()
        except Exception as error:  # any code may be behind it
            _warn(f"the detector {entry.name!r} ({entry.value}) cannot be loaded", error)
        else:
            found.append((entry.name, detector))
    return tuple(found)


def find_anomalies(
    recorded: Recorded, detectors: Sequence[tuple[str, Detector]] | None = None
) -> tuple[Anomaly, ...]:
    """Everything unusual in a record: the worst first, then by step and in the order of execution.

    ``detectors``, names and functions, are those of `all_detectors` by default. One that raises is
    warned of by its name, and the others run on. Asking twice gives equal results. Raises
    ``TypeError`` for the path of a run.
    """
    if isinstance(recorded, (str, os.PathLike)):
        raise TypeError(f"recorded={str(recorded)!r} is a path; give tmm.open_run(path)")
    read = ReadOnce(recorded)
    found: list[Anomaly] = []
    for name, detector in all_detectors() if detectors is None else detectors:
        found += found_by(name, detector, read)
    return in_order(found, read.keys())


def found_by(name: str, detector: Detector, recorded: Recorded) -> list[Anomaly]:
    """What one detector finds; nothing, with a warning, if it raises."""
    try:
        with np.errstate(all="ignore"):  # the numbers of a sick run overflow
            return list(detector(recorded))
    except (Exception, SystemExit) as error:  # the others have something to say, too
        _warn(f"the detector {name!r} failed and is left out", error)
        return []


def in_order(found: Iterable[Anomaly], keys: Iterable[str]) -> tuple[Anomaly, ...]:
    """Each anomaly once: the worst first, then by step and in the order of ``keys``."""
    places = {key: place for place, key in enumerate(keys)}

    def order(anomaly: Anomaly) -> tuple[int, int, int, str]:
        place = places.get(anomaly.key, len(places))
        return -SEVERITIES.index(anomaly.severity), anomaly.step, place, anomaly.kind

    return tuple(sorted(dict.fromkeys(found), key=order))


def _warn(text: str, error: BaseException) -> None:
    text = f"{text}: {type(error).__name__}: {error}"
    warnings.warn(text, stacklevel=levels_to_user())
