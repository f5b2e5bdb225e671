"""Which rows all ranks know of, and what they exchange to have those of all data together.

Plain arithmetic, without communication: see ``tmm.core.merging``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tmm.core import merging
from tmm.core.metrics import FloatArray, Reduction
from tmm.runtime.partials import Rows


def on_the_wire(reduction: Reduction) -> Reduction:
    """A reduction as all ranks know it: of its function and aggregate only the names are equal."""
    if reduction.function is None:
        return reduction
    name = reduction.aggregate_name
    return replace(reduction, function=_elsewhere, aggregate=name)  # type: ignore[arg-type]


def named_rows(name: str, columns: tuple[str, ...], aggregate: str = "sum") -> Reduction:
    """What stands on the wire for rows of something else than a tensor."""
    return Reduction((name,), columns, _elsewhere, aggregate)  # type: ignore[arg-type]


def _elsewhere(*tensors: object) -> object:
    raise AssertionError("runs on other ranks")


class JoinedLayout:
    """Which rows all ranks know of, in an order that is the same everywhere."""

    def __init__(self) -> None:
        self._sites: dict[Reduction, dict[str, int]] = {}
        self._kinds: dict[str, list[Reduction]] = {}
        self._places: dict[Reduction, tuple[Sequence[str], npt.NDArray[np.intp]]] = {}

    def missing(self, rows: Mapping[Reduction, Rows]) -> list[tuple[Reduction, str]]:
        """What is not in the layout yet."""
        return [
            (kind, site)
            for kind, (sites, _) in rows.items()
            if kind not in self._places or self._places[kind][0] is not sites
            for site in sites
            if site not in self._sites.get(kind, ())
        ]

    def extend(self, wanted: Sequence[Iterable[tuple[Reduction, str]]]) -> str | None:
        """Take what each rank lacks, in the order of ranks; says where two ranks disagree.

        They do where both measure a site, and not the same of it; None if they do not.
        """
        asked: list[dict[str, list[Reduction]]] = []
        for entries in wanted:
            by_site: dict[str, list[Reduction]] = {}
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
                        f"rank {rank} measures {site!r} as {_described(kinds)}, and other"
                        f" ranks as {_described(known)}"
                    )
        for by_site in asked:
            for site, kinds in by_site.items():
                self._kinds.setdefault(site, kinds)
        return None

    def own(self, rows: Mapping[Reduction, Rows]) -> dict[Reduction, FloatArray]:
        """The rows of this rank in the order of the layout; those that it lacks have count 0."""
        placed = {}
        for kind, places in self._sites.items():
            placed[kind] = merging.nothing(kind, len(places))
            if kind in rows:
                sites, values = rows[kind]
                known = self._places.get(kind)
                if known is None or known[0] is not sites:
                    # The same object in each step, as a rule.
                    known = sites, np.array([places[site] for site in sites], dtype=np.intp)
                    self._places[kind] = known
                placed[kind][known[1]] = values
        return placed

    def sites(self, kind: Reduction) -> tuple[str, ...]:
        """The sites of a kind."""
        return tuple(self._sites[kind])


Own = Mapping[Reduction, FloatArray]
"""The rows of one rank in the order of the layout."""


def maxima(own: Own) -> FloatArray:
    """What is maximised over ranks; one dimension."""
    return _flat(merging.maxima(kind, rows) for kind, rows in own.items())


def sums(own: Own, largest: FloatArray) -> FloatArray:
    """What is summed over ranks at first; ``largest`` is the maximum of ``maxima``."""
    take = _Reader(own, largest, merging.maximized)
    return _flat(merging.sums(kind, rows, take(kind)) for kind, rows in own.items())


def moments(own: Own, largest: FloatArray, total: FloatArray) -> FloatArray:
    """What is summed over ranks then; ``total`` is the sum of ``sums``."""
    first, second = _Reader(own, largest, merging.maximized), _Reader(own, total, merging.summed)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return _flat(
            merging.moments(kind, rows, first(kind), second(kind)) for kind, rows in own.items()
        )


def joined(
    layout: JoinedLayout, own: Own, largest: FloatArray, total: FloatArray, central: FloatArray
) -> dict[Reduction, Rows]:
    """The rows of all data, from the results of all ranks' ``maxima``, ``sums``, ``moments``."""
    readers = (
        _Reader(own, largest, merging.maximized),
        _Reader(own, total, merging.summed),
        _Reader(own, central, merging.central),
    )
    return {
        kind: (layout.sites(kind), merging.joined(kind, *(read(kind) for read in readers)))
        for kind in own
    }


class _Reader:
    """Takes the part of each kind from a flat array, one after the other."""

    def __init__(
        self, own: Own, values: FloatArray, columns: Callable[[Reduction], Sequence[str]]
    ) -> None:
        self._own, self._values, self._columns = own, values, columns
        self._place = 0

    def __call__(self, kind: Reduction) -> FloatArray:
        shape = len(self._columns(kind)), len(self._own[kind])
        start, self._place = self._place, self._place + shape[0] * shape[1]
        return self._values[start : self._place].reshape(shape)


def _flat(parts: Iterable[FloatArray]) -> FloatArray:
    return np.concatenate([np.empty(0), *(part.reshape(-1) for part in parts)])


def _described(kinds: Iterable[Reduction]) -> str:
    return "; ".join(f"{', '.join(kind.metrics)} ({kind.aggregate_name})" for kind in kinds)
