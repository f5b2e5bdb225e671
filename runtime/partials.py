"""What was measured: partial sums of sites, whatever they are of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch

from tmm.core.merging import merge, nothing
from tmm.core.metrics import Aggregate, FloatArray, Reduction, finalize
from tmm.core.records import Table
from tmm.runtime.key_binding import KeyRegistry

Rows: TypeAlias = tuple[tuple[str, ...], FloatArray]
"""Names of sites, and a row of each; shape (sites, width)."""

Logged: TypeAlias = dict[str, tuple[Aggregate, list[torch.Tensor]]]
"""Key to how its values are joined, and the values."""

_FEW = 4  # parts that are evaluated one by one


@dataclass(frozen=True, eq=False)
class Partials:
    """What one call of a graph, a micro-batch, a step or all ranks have measured.

    Attributes:
        rows: of each reduction parts, no two of which have a site in common.
        values: of functions whose aggregate needs all values those of each site.
        logged: what was logged by name.
        left_out: sites that were measured in a part of the step only, or not at all.
        alone: sites of which this rank has rows, and others have something else.
    """

    rows: Mapping[Reduction, Sequence[Rows]] = field(default_factory=dict)
    values: Mapping[tuple[Reduction, str], list[torch.Tensor]] = field(default_factory=dict)
    logged: Logged = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    alone: tuple[str, ...] = ()

    @staticmethod
    def merged(parts: Iterable[Partials]) -> Partials:
        """What all parts have measured together, of rows and values."""
        rows: dict[Reduction, list[Rows]] = {}
        values: dict[tuple[Reduction, str], list[torch.Tensor]] = {}
        for part in parts:
            for reduction, some in part.rows.items():
                rows.setdefault(reduction, []).extend(some)
            for key, tensors in part.values.items():
                values.setdefault(key, []).extend(tensors)
        merged: dict[Reduction, Sequence[Rows]] = {}
        for reduction, some in rows.items():
            # As most reductions have one part, whose sites nobody looks at.
            merged[reduction] = some if len(some) == 1 else merge_parts(reduction, some)
        return Partials(merged, values)

    def complete(self) -> Partials:
        """The same without what is left out."""
        if not self.left_out:
            return self
        rows = {
            reduction: [_without(part, self.left_out) for part in parts]
            for reduction, parts in self.rows.items()
        }
        kept = {key: some for key, some in self.values.items() if key[1] not in self.left_out}
        return replace(self, rows=rows, values=kept)

    def tables(self, registry: KeyRegistry) -> tuple[list[Table], list[Table]]:
        """Values of the metrics of all sites that have elements: numbers, and histograms."""
        scalars: list[Table] = []
        histograms: list[Table] = []
        for reduction, parts in self.rows.items():
            tables = histograms if reduction.is_histogram else scalars
            tables += [_table(reduction, *part, registry) for part in parts]
        return scalars, histograms


def merge_parts(reduction: Reduction, parts: Sequence[Rows]) -> Sequence[Rows]:
    """Few parts of which no two have a site in common."""
    same: dict[tuple[str, ...], list[FloatArray]] = {}
    for sites, rows in parts:
        same.setdefault(sites, []).append(rows)
    merged = [(sites, merge(reduction, rows)) for sites, rows in same.items()]
    if len(merged) == 1:
        return merged
    layout = {site: place for place, site in enumerate(dict.fromkeys(s for p in same for s in p))}
    if len(layout) == sum(map(len, same)):
        # Of very many, as of a model that is compiled block by block, one.
        return merged if len(merged) <= _FEW else (together(merged),)
    placed = []
    for sites, rows in merged:
        placed.append(nothing(reduction, len(layout)))
        placed[-1][[layout[site] for site in sites]] = rows
    return ((tuple(layout), merge(reduction, placed)),)


def together(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts in one, at least one part."""
    if len(parts) == 1:
        return parts[0]
    sites = tuple(site for sites, _ in parts for site in sites)
    return sites, np.concatenate([rows for _, rows in parts])


def _without(part: Rows, left_out: frozenset[str]) -> Rows:
    sites, rows = part
    kept = [position for position, site in enumerate(sites) if site not in left_out]
    return tuple(sites[position] for position in kept), rows[kept]


def _table(
    reduction: Reduction, sites: tuple[str, ...], rows: FloatArray, registry: KeyRegistry
) -> Table:
    if np.count_nonzero(rows[:, 0]) < len(rows):
        measured = rows[:, 0] > 0
        sites = tuple(site for site, there in zip(sites, measured, strict=True) if there)
        rows = rows[measured]
    values = finalize(reduction, rows)
    if not reduction.is_histogram:
        values = values.reshape(-1)
    infos = registry.infos(reduction, sites)
    return Table(infos, values, registry.keys(infos))
