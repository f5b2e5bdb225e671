"""Between what one rank has measured in a step and what all ranks exchange."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tmm.core.metrics import AGGREGATE_COLUMNS, Aggregate, FloatArray, Reduction
from tmm.runtime.partials import Logged, Partials, Rows, together
from tmm.runtime.ranks.joined_rows import named_rows, on_the_wire
from tmm.runtime.ranks.protocol import Exchange
from tmm.runtime.ranks.replica_rows import JOINED_REPLICAS, REPLICAS, differing, sent

_LOGGED = "logged"
"""The metric of rows that stand for what was logged by name."""

_LEFT_OUT = named_rows("left out", ("count",))
"""Rows that stand for sites that a rank has not measured in the whole step."""


def exchange_of(own: Partials) -> Exchange:
    """What a rank sends of what it has measured."""
    parts: dict[Reduction, list[Rows]] = {}
    for reduction, some in own.rows.items():
        if reduction == REPLICAS:
            parts[JOINED_REPLICAS] = [(sites, sent(rows)) for sites, rows in some]
        else:
            parts.setdefault(on_the_wire(reduction), []).extend(some)
    values: dict[str, list[torch.Tensor]] = {}
    for key, (aggregate, tensors) in own.logged.items():
        if callable(aggregate):
            values[key] = tensors
        else:
            kind = named_rows(_LOGGED, AGGREGATE_COLUMNS[aggregate], aggregate)
            parts.setdefault(kind, []).append(((key,), _row(kind, tensors)))
    if own.left_out:
        sites = tuple(f"{site} left out" for site in sorted(own.left_out))
        parts[_LEFT_OUT] = [(sites, np.ones((len(sites), 1)))]
    collected = {(on_the_wire(kind), site): some for (kind, site), some in own.values.items()}
    payloads: tuple[bytes, ...] = ()
    if collected or values:
        written = io.BytesIO()
        torch.save((collected, values), written)
        payloads = (written.getvalue(),)
    return Exchange({kind: together(some) for kind, some in parts.items()}, payloads)


def of_all_ranks(
    step: Exchange, own: Partials, functions_of_all: Iterable[Reduction] = ()
) -> Partials:
    """What all ranks have measured together. On other ranks than 0, without callable aggregates.

    ``functions_of_all`` are those with such an aggregate, also those that this rank has none of.
    """
    known = {on_the_wire(reduction): reduction for reduction in own.rows}
    functions = {on_the_wire(reduction): reduction for reduction in functions_of_all}
    functions |= {on_the_wire(reduction): reduction for reduction, _ in own.values}
    rows: dict[Reduction, Sequence[Rows]] = {}
    logged: Logged = {}
    found = Partials()
    for kind, (sites, values) in step.rows.items():
        if kind == JOINED_REPLICAS:
            found = replace(found, alone=tuple(differing(sites, values)))
        elif kind == _LEFT_OUT:
            there = (site for site, row in zip(sites, values, strict=True) if row[0] > 0)
            found = replace(
                found, left_out=frozenset(site.removesuffix(" left out") for site in there)
            )
        elif kind.metrics == (_LOGGED,):
            logged |= dict(_numbers(kind, sites, values))
        else:
            rows[known.get(kind, kind)] = ((sites, values),)
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
    return replace(found, rows=rows, values=collected, logged=logged)


def _row(kind: Reduction, tensors: Iterable[torch.Tensor]) -> FloatArray:
    values = torch.cat([tensor.reshape(-1) for tensor in tensors]).to(torch.float64).numpy()
    columns: dict[str, Any] = {"count": values.size}
    if values.size:
        columns |= {"sum": values.sum(), "sum_squares": (values**2).sum()}
        columns |= {"minimum": values.min(), "maximum": values.max()}
    return np.array([[float(columns.get(name, 0.0)) for name in kind.columns]])


def _numbers(
    kind: Reduction, sites: Iterable[str], rows: FloatArray
) -> Iterator[tuple[str, tuple[Aggregate, list[torch.Tensor]]]]:
    for site, (count, value) in zip(sites, rows, strict=True):
        if count > 0:
            number = value / count if kind.aggregate == "mean" else value
            number = np.sqrt(number) if kind.aggregate == "norm" else number
            yield site, (kind.aggregate, [torch.tensor(number, dtype=torch.float64, device="cpu")])
