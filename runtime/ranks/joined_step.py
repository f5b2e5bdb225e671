"""Between what one rank gathered in a step and what all ranks join."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tmm.core.metrics import AGGREGATE_COLUMNS, Aggregate, FloatArray, Reduction
from tmm.runtime.ranks.joined_rows import RowKind
from tmm.runtime.ranks.protocol import Contribution, JoinedStep
from tmm.runtime.ranks.replica_rows import JOINED_REPLICAS, REPLICAS, differing, sent

_LOGGED = "logged"
"""The metric of rows that stand for what was logged by name."""

_LEFT_OUT = RowKind(("left out",), ("count",), "sum", is_function=True)
"""Rows that stand for sites that a rank has not measured in the whole step."""

Logged = dict[str, tuple[Aggregate, list[torch.Tensor]]]
"""Key to how its values are joined, and the values."""


Rows = tuple[tuple[str, ...], FloatArray]
"""Names of sites, and a row of each."""


@dataclass(frozen=True, eq=False)
class Gathered:
    """What arrived in a step: rows by reduction, values of callable aggregates, and logged ones.

    A site is in one of the parts of a reduction's rows at most. ``alone`` are the sites of which
    this rank has rows, and others have something else; those that are ``left_out`` were measured in
    a part of the step only, or not at all.
    """

    rows: Mapping[Reduction, Sequence[Rows]]
    collected: Mapping[tuple[Reduction, str], list[torch.Tensor]]
    logged: Logged
    alone: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()

    def complete(self) -> Gathered:
        """The same without what is left out."""
        if not self.left_out:
            return self
        rows = {
            reduction: [_without(part, self.left_out) for part in parts]
            for reduction, parts in self.rows.items()
        }
        collected = {
            key: tensors for key, tensors in self.collected.items() if key[1] not in self.left_out
        }
        return Gathered(rows, collected, self.logged)


def _without(part: Rows, left_out: frozenset[str]) -> Rows:
    sites, rows = part
    kept = [position for position, site in enumerate(sites) if site not in left_out]
    return tuple(sites[position] for position in kept), rows[kept]


def contribution_of(gathered: Gathered) -> Contribution:
    """What a rank sends of it."""
    parts: dict[RowKind, list[Rows]] = {}
    for reduction, some in gathered.rows.items():
        if reduction == REPLICAS:
            parts[JOINED_REPLICAS] = [(sites, sent(rows)) for sites, rows in some]
        else:
            parts.setdefault(RowKind.of(reduction), []).extend(some)
    values: dict[str, list[torch.Tensor]] = {}
    for key, (aggregate, tensors) in gathered.logged.items():
        if callable(aggregate):
            values[key] = tensors
        else:
            kind = RowKind((_LOGGED,), AGGREGATE_COLUMNS[aggregate], aggregate, is_function=True)
            parts.setdefault(kind, []).append(((key,), _row(kind, tensors)))
    if gathered.left_out:
        sites = tuple(f"{site} left out" for site in sorted(gathered.left_out))
        parts[_LEFT_OUT] = [(sites, np.ones((len(sites), 1)))]
    collected = {
        (RowKind.of(reduction), site): tensors
        for (reduction, site), tensors in gathered.collected.items()
    }
    payload = b""
    if collected or values:
        written = io.BytesIO()
        torch.save((collected, values), written)
        payload = written.getvalue()
    return Contribution({kind: together(some) for kind, some in parts.items()}, payload)


def of_all_ranks(step: JoinedStep, own: Gathered) -> Gathered:
    """What all ranks gathered together. On other ranks than 0, without callable aggregates."""
    known = {RowKind.of(reduction): reduction for reduction in own.rows}
    functions = {RowKind.of(reduction): reduction for reduction, _ in own.collected}
    rows: dict[Reduction, Sequence[Rows]] = {}
    logged: Logged = {}
    alone: tuple[str, ...] = ()
    left_out: frozenset[str] = frozenset()
    for kind, (sites, values) in step.rows.items():
        if kind == JOINED_REPLICAS:
            alone = tuple(differing(sites, values))
        elif kind == _LEFT_OUT:
            there = (site for site, row in zip(sites, values, strict=True) if row[0] > 0)
            left_out = frozenset(site.removesuffix(" left out") for site in there)
        elif kind.metrics == (_LOGGED,):
            logged |= dict(_numbers(kind, sites, values))
        else:
            rows[known.get(kind) or _stand_in(kind)] = ((tuple(sites), values),)
    collected: dict[tuple[Reduction, str], list[torch.Tensor]] = {}
    for payload in step.payloads:
        if not payload.strip(b"\0"):
            continue
        theirs, named = torch.load(io.BytesIO(payload), weights_only=False)
        for (kind, site), tensors in theirs.items():
            if kind in functions:
                collected.setdefault((functions[kind], site), []).extend(tensors)
        for key, tensors in named.items():
            if key in own.logged:
                aggregate = own.logged[key][0]
                logged.setdefault(key, (aggregate, []))[1].extend(tensors)
    return Gathered(rows, collected, logged, alone, left_out)


def together(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts in one, at least one part."""
    if len(parts) == 1:
        return parts[0]
    sites = tuple(site for sites, _ in parts for site in sites)
    return sites, np.concatenate([rows for _, rows in parts])


def _row(kind: RowKind, tensors: Iterable[torch.Tensor]) -> FloatArray:
    values = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(torch.float64).numpy()
    columns: dict[str, Any] = {"count": values.size}
    if values.size:
        columns |= {"sum": values.sum(), "sum_squares": (values**2).sum()}
        columns |= {"minimum": values.min(), "maximum": values.max()}
    return np.array([[float(columns.get(name, 0.0)) for name in kind.columns]])


def _numbers(
    kind: RowKind, sites: Iterable[str], rows: FloatArray
) -> Iterable[tuple[str, tuple[Aggregate, list[torch.Tensor]]]]:
    for site, (count, value) in zip(sites, rows, strict=True):
        if count > 0:
            number = value / count if kind.aggregate == "mean" else value
            number = np.sqrt(number) if kind.aggregate == "norm" else number
            yield site, (kind.aggregate, [torch.tensor(number, dtype=torch.float64)])  # type: ignore[misc]


def _stand_in(kind: RowKind) -> Reduction:
    """The reduction of rows that only other ranks have."""
    if not kind.is_function:
        return Reduction(kind.metrics, kind.columns)
    return Reduction(kind.metrics, kind.columns, _elsewhere, kind.aggregate)  # type: ignore[arg-type]


def _elsewhere(*tensors: torch.Tensor) -> object:
    raise AssertionError("runs on other ranks")
