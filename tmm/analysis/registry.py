"""Which detectors there are, and all that they find in a record."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TypeAlias

from tmm.analysis.anomaly import SEVERITIES, Anomaly
from tmm.analysis.detectors import activations, attention, gradients, loss, updates
from tmm.analysis.detectors.activations import activation_outliers, exploding_activations
from tmm.analysis.detectors.attention import collapsed_attention, growing_logits
from tmm.analysis.detectors.dead_units import DEATHS_END, dead_units
from tmm.analysis.detectors.gradients import (
    exploding_gradients,
    idle_parameters,
    vanishing_gradients,
)
from tmm.analysis.detectors.loss import loss_divergence, loss_drops, loss_plateaus, loss_spikes
from tmm.analysis.detectors.memory import GROWTH_ENDS, growing_memory
from tmm.analysis.detectors.nonfinite_values import nonfinite
from tmm.analysis.detectors.updates import large_updates, small_updates
from tmm.analysis.ending import EndsWith
from tmm.analysis.recorded import ReadOnce
from tmm.core.failures import levels_to_user
from tmm.core.series_by_key import Recorded

Detector: TypeAlias = Callable[[Recorded], Iterable[Anomaly]]

GROUP = "tmm.detectors"
"""The group of entry points under which other packages offer detectors."""

BUILT_IN: tuple[tuple[str, Detector], ...] = (
    ("nonfinite", nonfinite),
    ("exploding_gradients", exploding_gradients),
    ("vanishing_gradients", vanishing_gradients),
    ("idle_parameters", idle_parameters),
    ("loss_spikes", loss_spikes),
    ("loss_drops", loss_drops),
    ("loss_divergence", loss_divergence),
    ("loss_plateaus", loss_plateaus),
    ("dead_units", dead_units),
    ("collapsed_attention", collapsed_attention),
    ("growing_logits", growing_logits),
    ("activation_outliers", activation_outliers),
    ("exploding_activations", exploding_activations),
    ("large_updates", large_updates),
    ("small_updates", small_updates),
    ("growing_memory", growing_memory),
)


ENDINGS: Mapping[Detector, tuple[EndsWith, ...]] = {
    exploding_gradients: gradients.EXPLOSIONS_END,
    vanishing_gradients: gradients.VANISHING_ENDS,
    idle_parameters: gradients.IDLE_ENDS,
    loss_spikes: loss.SPIKES_END,
    loss_drops: loss.DROPS_END,
    loss_divergence: loss.DIVERGENCES_END,
    loss_plateaus: loss.PLATEAUS_END,
    dead_units: DEATHS_END,
    collapsed_attention: attention.COLLAPSES_END,
    growing_logits: attention.LOGITS_END,
    activation_outliers: activations.OUTLIERS_END,
    exploding_activations: activations.EXPLOSIONS_END,
    large_updates: updates.LARGE_END,
    small_updates: updates.SMALL_END,
    growing_memory: GROWTH_ENDS,
}
"""Of built-in detectors, with which newest values their episodes end."""


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
