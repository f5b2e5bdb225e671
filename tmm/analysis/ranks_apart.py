"""Which rank of a training is unlike the others, where each has recorded its own rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np

from tmm.core.series_by_key import Recorded

_TINY = 1e-30


def ranks_apart(ranks: Mapping[int, Recorded]) -> dict[int, float]:
    """How far each rank is from most, the farthest first; by the number of a rank.

    ``ranks`` are what each has recorded, as ``tmm.open_run(path, rank=k)`` gives it. A distance is
    the mean, over keys and steps that all ranks have, of the distance from the median of the ranks,
    relative to that, at most 1 for each key. A value that is not finite where that of most is has a
    distance of 1. Of two ranks both are as far.
    """
    recorded = list(ranks.values())
    known = [set(one.keys()) for one in recorded]
    keys = set.intersection(*known) if known else set()
    sums, count = np.zeros(len(recorded)), 0
    for key in sorted(keys):
        series = [one.series(key) for one in recorded]
        if any(values.ndim > 1 for _, values in series):
            continue  # histograms
        steps = reduce(np.intersect1d, (steps for steps, _ in series))
        values = np.stack([values[np.isin(own, steps)] for own, values in series])
        finite = np.isfinite(values)
        usual = 2 * finite.sum(axis=0) > len(recorded)
        if not usual.any():
            continue
        values, finite = values[:, usual], finite[:, usual]
        middle = np.nanmedian(np.where(finite, values, np.nan), axis=0)
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(values - middle) / np.maximum(np.abs(middle), _TINY)
        sums += np.where(finite, np.minimum(apart, 1.0), 1.0).mean(axis=1)
        count += 1
    found = {rank: float(s / max(count, 1)) for rank, s in zip(ranks, sums, strict=True)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
