"""Rows of one step on several ranks, and how they become the rows of all data together.

Plain arithmetic, without communication: what is summed or maximised over the ranks, and what
follows from the result. The layout, which rows there are in which order, is the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from tmm.core.metrics import HISTOGRAM_EDGES, FloatArray, Reduction

_EXTREMES = ("absmax", "minimum", "maximum")
_MOMENTS = ("mean", "moment2", "moment3", "moment4")


@dataclass(frozen=True)
class RowKind:
    """What rows that are joined alike have in common; equal on ranks that measure the same.

    ``label`` tells what it is to a reader.
    """

    metrics: tuple[str, ...]
    columns: tuple[str, ...]
    aggregate: str
    is_function: bool

    @classmethod
    def of(cls, reduction: Reduction) -> RowKind:
        """That of the rows of a reduction."""
        is_function = reduction.function is not None
        return cls(reduction.metrics, reduction.columns, reduction.aggregate_name, is_function)

    @property
    def width(self) -> int:
        """The number of values in a row; histograms have no columns."""
        return len(self.columns) or len(HISTOGRAM_EDGES)

    def __str__(self) -> str:
        return f"{', '.join(self.metrics)} ({self.aggregate})"


Rows: TypeAlias = Mapping[RowKind, tuple[Sequence[str], FloatArray]]
"""Of each kind the sites and their rows, shape (sites, width)."""


class JoinedLayout:
    """Which rows all ranks know of, in an order that is the same everywhere."""

    def __init__(self) -> None:
        self._sites: dict[RowKind, dict[str, int]] = {}
        self._kinds: dict[str, list[RowKind]] = {}
        self._places: dict[RowKind, tuple[Sequence[str], npt.NDArray[np.intp]]] = {}

    def missing(self, rows: Rows) -> list[tuple[RowKind, str]]:
        """What is not in the layout yet."""
        return [
            (kind, site)
            for kind, (sites, _) in rows.items()
            if kind not in self._places or self._places[kind][0] is not sites
            for site in sites
            if site not in self._sites.get(kind, ())
        ]

    def extend(self, wanted: Sequence[Iterable[tuple[RowKind, str]]]) -> str | None:
        """Take what each rank lacks, in the order of ranks; says where two ranks disagree.

        They do where both measure a site, and not the same of it; None if they do not.
        """
        asked: list[dict[str, list[RowKind]]] = []
        for entries in wanted:
            by_site: dict[str, list[RowKind]] = {}
            for kind, site in entries:
                by_site.setdefault(site, []).append(kind)
                self._sites.setdefault(kind, {}).setdefault(site, len(self._sites[kind]))
            asked.append(by_site)
        first = next((by_site for by_site in asked if by_site), {})
        for rank, by_site in enumerate(asked):
            for site, kinds in by_site.items():
                known = self._kinds.get(site, first.get(site, kinds))
                if set(known) != set(kinds):
                    return (
                        f"rank {rank} measures {site!r} as {'; '.join(map(str, kinds))}, and other"
                        f" ranks as {'; '.join(map(str, known))}"
                    )
        for by_site in asked:
            for site, kinds in by_site.items():
                self._kinds.setdefault(site, kinds)
        return None

    def own(self, rows: Rows) -> dict[RowKind, FloatArray]:
        """The rows of this rank in the order of the layout; those that it lacks have count 0."""
        placed = {}
        for kind, places in self._sites.items():
            placed[kind] = _nothing(kind, len(places))
            if kind in rows:
                sites, values = rows[kind]
                known = self._places.get(kind)
                if known is None or known[0] is not sites:
                    # The same object in each step, as a rule.
                    known = sites, np.array([places[site] for site in sites], dtype=np.intp)
                    self._places[kind] = known
                placed[kind][known[1]] = values
        return placed

    def sites(self, kind: RowKind) -> tuple[str, ...]:
        """The sites of a kind."""
        return tuple(self._sites[kind])

    @property
    def kinds(self) -> tuple[RowKind, ...]:
        """All kinds."""
        return tuple(self._sites)


def maxima(own: Mapping[RowKind, FloatArray]) -> FloatArray:
    """What is maximised over ranks: extremes, minima negated, NaN left out; one dimension."""
    parts = [np.empty(0)]
    for kind, rows in own.items():
        for name in _present(kind, _EXTREMES):
            values = rows[:, kind.columns.index(name)]
            values = -values if name == "minimum" else values
            parts.append(np.where(np.isnan(values), -np.inf, values))
    return np.concatenate(parts)


def sums(own: Mapping[RowKind, FloatArray]) -> FloatArray:
    """What is summed over ranks at first: counts, sums, and where extremes were NaN."""
    parts = [np.empty(0)]
    for kind, rows in own.items():
        if not kind.columns:
            parts.append(rows.reshape(-1))
        for place, name in enumerate(kind.columns):
            values = rows[:, place]
            if name in _EXTREMES:
                values = np.isnan(values).astype(np.float64)
            elif name == "mean":
                values = np.where(rows[:, 0] > 0, rows[:, 0] * values, 0.0)
            elif name in _MOMENTS:
                continue
            parts.append(values)
    return np.concatenate(parts)


def moments(own: Mapping[RowKind, FloatArray], total: FloatArray) -> FloatArray:
    """What is summed over ranks then: central moments about the means of all data.

    ``total`` is the sum of `sums`. With d the distance of a rank's mean from the joint one, the
    moments about it are m2 + n d², m3 + 3 d m2 + n d³ and m4 + 4 d m3 + 6 d² m2 + n d⁴.
    """
    parts = [np.empty(0)]
    reader = _Reader(total)
    for kind, rows in own.items():
        joint = _read_sums(kind, reader, len(rows))
        if "mean" not in kind.columns:
            continue
        part = {
            name: rows[:, kind.columns.index(name)] for name in ("count", *_present_moments(kind))
        }
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            count = part["count"]
            distance = part["mean"] - joint["mean"] / joint["count"]
            second = part["moment2"]
            found = [second + count * distance**2]
            if "moment4" in part:
                third = part["moment3"]
                found.append(third + 3 * distance * second + count * distance**3)
                found.append(
                    part["moment4"]
                    + 4 * distance * third
                    + 6 * distance**2 * second
                    + count * distance**4
                )
        parts += [np.where(count > 0, moment, 0.0) for moment in found]
    return np.concatenate(parts)


def joined(
    layout: JoinedLayout, largest: FloatArray, total: FloatArray, central: FloatArray
) -> dict[RowKind, tuple[tuple[str, ...], FloatArray]]:
    """The rows of all data, from the results of all ranks' `maxima`, `sums` and `moments`."""
    results: dict[RowKind, tuple[tuple[str, ...], FloatArray]] = {}
    extremes, sum_reader, moment_reader = _Reader(largest), _Reader(total), _Reader(central)
    for kind in layout.kinds:
        sites = layout.sites(kind)
        if not kind.columns:
            rows = sum_reader.take(len(sites) * kind.width).reshape(len(sites), kind.width)
            results[kind] = sites, rows
            continue
        columns = _read_sums(kind, sum_reader, len(sites))
        for name in _present(kind, _EXTREMES):
            values = extremes.take(len(sites))
            values = -values if name == "minimum" else values
            columns[name] = np.where(columns[name] > 0, np.nan, values)
        if "mean" in columns:
            with np.errstate(invalid="ignore", divide="ignore"):
                columns["mean"] = columns["mean"] / columns["count"]
            for name in _present_moments(kind)[1:]:
                columns[name] = moment_reader.take(len(sites))
        results[kind] = sites, np.stack([columns[name] for name in kind.columns], axis=1)
    return results


class _Reader:
    """Takes parts of a flat array, one after the other."""

    def __init__(self, values: FloatArray) -> None:
        self._values = values
        self._place = 0

    def take(self, count: int) -> FloatArray:
        part = self._values[self._place : self._place + count]
        self._place += count
        return part


def _read_sums(kind: RowKind, reader: _Reader, count: int) -> dict[str, FloatArray]:
    if not kind.columns:
        reader.take(count * kind.width)
        return {}
    summed = (name for name in kind.columns if name not in _MOMENTS[1:])
    return {name: reader.take(count) for name in summed}


def _nothing(kind: RowKind, count: int) -> FloatArray:
    """Rows of no elements."""
    rows = np.zeros((count, kind.width))
    for name in _present(kind, _EXTREMES):
        rows[:, kind.columns.index(name)] = np.inf if name == "minimum" else -np.inf
    return rows


def _present(kind: RowKind, names: Iterable[str]) -> list[str]:
    chosen = set(names)
    return [name for name in kind.columns if name in chosen]


def _present_moments(kind: RowKind) -> list[str]:
    return _present(kind, _MOMENTS)
