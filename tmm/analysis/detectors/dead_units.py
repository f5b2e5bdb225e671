"""Units that have died: outputs that are zero, and stay so."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tmm.analysis.anomaly import Anomaly, Episode, Severity, episodes, number
from tmm.analysis.ending import Ending, EndsWith
from tmm.analysis.layers import is_output
from tmm.analysis.recent import Newest
from tmm.analysis.robust import bridged, early_median, median, runs
from tmm.analysis.series import BoolArray, Series, is_metric, named, series_of
from tmm.core.keys import key_of
from tmm.core.series_by_key import Recorded

_DEAD = 0.9
_is_share = is_metric("activation", "zero_fraction")


def dead_units(
    recorded: Recorded,
    *,
    medium: float = _DEAD,
    high: float = 0.99,
    alive: float = 0.8,
    part: float = 0.5,
    least: int = 5,
) -> Iterator[Anomaly]:
    """Modules whose output is mostly exact zeros, in ``least`` recorded steps in a row.

    A ``zero_fraction`` of ``high`` and more is high, of ``medium`` and more medium, if it was below
    ``alive`` in a step before; so what is sparse by design, such as a dropout, is none. Until it is
    below ``alive`` again it is one episode. High is also what has been above ``high`` in every
    recorded step, unless its share of zeros is always the same and not all of it, as that of
    one-hot vectors. Medium becomes low where the root mean square of the output is then still
    ``part`` of its early median: the few units that are left carry on, a sparse code.
    """
    for series in series_of(recorded, _is_share):
        shares = series.finite()
        dead = shares.values >= high
        always = len(dead) >= least and bool(dead.all()) and not _is_constant(shares)
        was_alive = np.logical_or.accumulate(shares.values < alive)
        dying = bridged(was_alive & (shares.values >= medium), shares.values >= alive)
        for episode in episodes(shares, dead if always else dying, least=least):
            of_all = any(True for _ in runs(dead[episode.places], least))
            limit = high if of_all else medium
            text = (
                f"{100 * limit:.3g} % or more of the output of {series.site} is zero"
                f" {episode.when} (up to {100 * episode.value:.4g} %); "
            )
            if always:
                text += "it has been so from the first recorded step."
            else:
                lowest = float(shares.values[: episode.places.start].min())
                text += f"before, it was as little as {number(100 * lowest)} %."
            severity: Severity = "high" if of_all else "medium"
            if not of_all and _carries_on(recorded, episode, part):
                severity, text = (
                    "low",
                    text + " The size of its output is what it was: it is sparse.",
                )
            yield episode.anomaly("dead_units", severity, limit, text)


def _carries_on(recorded: Recorded, episode: Episode, part: float) -> bool:
    """Whether an output is about as large as it was at first."""
    info = episode.series.info
    sizes = named(recorded, key_of(info.kind, info.site, "rms"))
    if sizes is None:
        return False
    values = sizes.on(episode.series.steps[episode.places])
    early = early_median(sizes.finite().values)
    return bool(np.isfinite(values).all() and early > 0 and median(values) >= part * early)


def _is_constant(shares: Series) -> bool:
    """Whether the share never changes, and is not all."""
    same: BoolArray = shares.values == shares.values[0]
    return bool(same.all()) and float(shares.values[0]) < 1.0


def _dead(newest: Newest) -> Ending:
    return Ending.of(newest, newest.values >= _DEAD)


DEATHS_END = (EndsWith("dead_units", "high", _is_share, _dead, None, is_output),)
