"""Parameters that a layer shared with another until the run was resumed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, episodes
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.layers import is_output, is_parameter
from tmm.analysis.recent import Newest
from tmm.analysis.series import named, series_of
from tmm.core.keys import STARTED, layer_of, untrained_of
from tmm.core.records import KeyInfo
from tmm.core.series_by_key import Recorded


def untied_parameters(recorded: Recorded) -> Iterator[Anomaly]:
    """Parameters that began to be ones of their own when the run was resumed: medium.

    Their module ran before, and most other parameters were there, so that it used one of another
    module. Weights that were never tied, as in many models, cannot be told from what is recorded.
    """
    starts = named(recorded, STARTED)
    if starts is None or len(starts.steps) < 2:
        return
    sizes = [series for series in series_of(recorded, is_parameter) if len(series.steps)]
    untrained = {
        (told[1], int(series.steps[0]))
        for series in series_of(recorded, lambda info: untrained_of(info) is not None)
        if len(series.steps) and (told := untrained_of(series.info))
    }
    ran = {layer_of(s.info): s.steps[0] for s in series_of(recorded, is_output) if len(s.steps)}
    begins = np.array([series.steps[0] for series in sizes])
    for start in starts.steps[1:].tolist():
        old = begins < start
        if 2 * old.sum() <= len(sizes):
            continue
        first = min(s.steps[s.steps >= start].min(initial=1 << 62) for s in sizes)
        for series in (s for s in sizes if s.steps[0] == first):
            layer = series.site.rpartition(".")[0]
            was_there = any(name == series.site and step < start for name, step in untrained)
            if was_there or not ran.get(layer, start) < start:
                continue
            flagged = np.arange(len(series.steps)) == 0
            (episode,) = episodes(series, flagged)
            text = (
                f"{series.site} is a parameter of its own since the run was resumed at step"
                f" {first}, and {layer} ran before without one: was it tied to another?"
            )
            yield episode.anomaly("parameter_untied", "medium", 0.0, text)


def _begins(newest: Newest) -> Ending:
    none = np.zeros(len(newest), dtype=np.bool_)
    if not len(newest):
        return Ending.of(newest, none)
    is_new = np.isnan(newest.before(1)[:, 0])
    return Ending.of(newest, is_new & (not is_new.all()), none)


def _one(info: KeyInfo) -> int:
    return 0


def _reads(info: KeyInfo) -> bool:
    return info.key == STARTED or is_output(info) or untrained_of(info) is not None


UNTYING_ENDS = (EndsWith("parameter_untied", "medium", is_parameter, _begins, _one, _reads),)
