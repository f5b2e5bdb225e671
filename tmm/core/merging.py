"""How the rows of several parts become the rows of all their data together.

Parts are calls, micro-batches, groups of tensors or ranks. Whatever they are, they are joined by
one maximum and two sums over them, so that ranks need three collectives and no more: extremes, then
counts and sums, then central moments about the mean of all data. Where a part has nothing of a
site, its row is that of no elements. Everything is numpy in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tmm.core.metrics import FloatArray, Reduction

_EXTREMES = ("absmax", "minimum", "maximum")
_CENTRAL = ("moment2", "moment3", "moment4")


def merge(reduction: Reduction, parts: Sequence[FloatArray]) -> FloatArray:
    """Rows of the joined data, from the rows of each part, all of shape ``(sites, width)``."""
    if len(parts) == 1:
        return parts[0]
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        largest = np.maximum.reduce([maxima(reduction, part) for part in parts])
        total = np.add.reduce([sums(reduction, part, largest) for part in parts])
        central = np.add.reduce([moments(reduction, part, largest, total) for part in parts])
    return joined(reduction, largest, total, central)


def nothing(reduction: Reduction, sites: int) -> FloatArray:
    """Rows of no elements."""
    rows = np.zeros((sites, reduction.width))
    for name in maximized(reduction):
        if name in _EXTREMES:
            rows[:, reduction.columns.index(name)] = np.inf if name == "minimum" else -np.inf
    return rows


def maximized(reduction: Reduction) -> tuple[str, ...]:
    """The columns of which ``maxima`` gives something, in order."""
    return tuple(name for name in reduction.columns if name in (*_EXTREMES, "mean"))


def summed(reduction: Reduction) -> tuple[str, ...]:
    """The columns of which ``sums`` gives something; of a histogram the places of its row."""
    if reduction.is_histogram:
        return tuple(map(str, range(reduction.width)))
    return tuple(name for name in reduction.columns if name not in _CENTRAL)


def central(reduction: Reduction) -> tuple[str, ...]:
    """The columns of which ``moments`` gives something."""
    return tuple(name for name in reduction.columns if name in _CENTRAL)


def maxima(reduction: Reduction, rows: FloatArray) -> FloatArray:
    """What is maximised over parts, shape ``(maximized, sites)``: extremes, and one mean of all.

    Minima are negated, NaN is left out.
    """
    found = [np.empty((0, len(rows)))]
    for name in maximized(reduction):
        values = rows[:, reduction.columns.index(name)]
        values = -values if name == "minimum" else values
        if name == "mean":
            values = np.where(rows[:, 0] > 0, values, -np.inf)
        found.append(np.where(np.isnan(values), -np.inf, values)[None])
    return np.concatenate(found)


def sums(reduction: Reduction, rows: FloatArray, largest: FloatArray) -> FloatArray:
    """What is summed over parts at first, shape ``(summed, sites)``.

    That is counts, sums, where extremes were NaN, and how far means are from that of ``largest``,
    the maximum of ``maxima``: of equal means nothing is lost to rounding.
    """
    if reduction.is_histogram:
        return rows.T
    found = []
    for name in summed(reduction):
        values = rows[:, reduction.columns.index(name)]
        if name in _EXTREMES:
            values = np.isnan(values).astype(np.float64)
        elif name == "mean":
            distance = values - _origin(reduction, largest)
            values = np.where(rows[:, 0] > 0, rows[:, 0] * distance, 0.0)
        found.append(values)
    return np.stack(found)


def moments(
    reduction: Reduction, rows: FloatArray, largest: FloatArray, total: FloatArray
) -> FloatArray:
    """What is summed over parts then, shape ``(central, sites)``: moments about the joint mean.

    ``total`` is the sum of ``sums``. With d the distance of a part's mean from the joint one, the
    moments about it are m2 + n d², m3 + 3 d m2 + n d³ and m4 + 4 d m3 + 6 d² m2 + n d⁴ (Pébay
    2008, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
    statistical moments").
    """
    names = central(reduction)
    if not names:
        return np.empty((0, len(rows)))
    own = {name: rows[:, index] for index, name in enumerate(reduction.columns)}
    count, second = own["count"], own["moment2"]
    distance = own["mean"] - _joint_mean(reduction, largest, total)
    found = [second + count * distance**2]
    if "moment4" in own:
        third = own["moment3"]
        found.append(third + 3 * distance * second + count * distance**3)
        found.append(
            own["moment4"] + 4 * distance * third + 6 * distance**2 * second + count * distance**4
        )
    return np.stack([np.where(count > 0, moment, 0.0) for moment in found])


def joined(
    reduction: Reduction, largest: FloatArray, total: FloatArray, about_mean: FloatArray
) -> FloatArray:
    """The rows of all data, from the results of ``maxima``, ``sums`` and ``moments``."""
    if reduction.is_histogram:
        return np.ascontiguousarray(total.T)
    columns = dict(zip(summed(reduction), total, strict=True))
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, values in zip(maximized(reduction), largest, strict=True):
            if name == "mean":
                columns[name] = _joint_mean(reduction, largest, total)
            else:
                values = -values if name == "minimum" else values
                columns[name] = np.where(columns[name] > 0, np.nan, values)
    columns |= zip(central(reduction), about_mean, strict=True)
    return np.stack([columns[name] for name in reduction.columns], axis=1)


def _origin(reduction: Reduction, largest: FloatArray) -> FloatArray:
    """What means are measured from: one of them, the same for all parts."""
    found = largest[maximized(reduction).index("mean")]
    return np.where(np.isfinite(found), found, 0.0)


def _joint_mean(reduction: Reduction, largest: FloatArray, total: FloatArray) -> FloatArray:
    names = summed(reduction)
    count = total[names.index("count")]
    mean: FloatArray = total[names.index("mean")] / np.where(count > 0, count, 1.0)
    return mean + _origin(reduction, largest)
