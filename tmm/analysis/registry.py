"""Which detectors there are, and all that they find in a record."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import entry_points
from typing import TypeAlias

from tmm.analysis.anomaly import SEVERITIES, Anomaly
from tmm.analysis.detectors.activations import activation_outliers, exploding_activations
from tmm.analysis.detectors.attention import collapsed_attention, growing_logits
from tmm.analysis.detectors.dead_units import dead_units
from tmm.analysis.detectors.gradients import (
    exploding_gradients,
    idle_parameters,
    vanishing_gradients,
)
from tmm.analysis.detectors.loss import loss_divergence, loss_drops, loss_plateaus, loss_spikes
from tmm.analysis.detectors.memory import growing_memory
from tmm.analysis.detectors.nonfinite import nonfinite
from tmm.analysis.detectors.updates import large_updates, small_updates
from tmm.analysis.recorded import ReadOnce, Recorded

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
    warned of by its name, and the others run on. Asking twice gives equal results.
    """
    read = ReadOnce(recorded)
    found: dict[Anomaly, None] = {}
    for name, detector in all_detectors() if detectors is None else detectors:
        try:
            found |= dict.fromkeys(detector(read))
        except Exception as error:  # the others have something to say, too
            _warn(f"the detector {name!r} failed and is left out", error)
    places = {key: place for place, key in enumerate(read.keys())}

    def order(anomaly: Anomaly) -> tuple[int, int, int, str]:
        place = places.get(anomaly.key, len(places))
        return -SEVERITIES.index(anomaly.severity), anomaly.step, place, anomaly.kind

    return tuple(sorted(found, key=order))


def _warn(text: str, error: Exception) -> None:
    warnings.warn(f"{text}: {type(error).__name__}: {error}", stacklevel=3)
