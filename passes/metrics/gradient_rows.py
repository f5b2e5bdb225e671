"""The rows of gradients: how they lie in the extra input, and what comes back as them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from tmm.core.families import ACTIVATION_GRADIENT
from tmm.core.metrics import Reduction
from tmm.core.records import Measurement, PackedLayout, Share, Site, Slot
from tmm.core.torch_private import FakeTensor
from tmm.kernels.dense import packed_dtype
from tmm.kernels.fused.choose_lowering import TOGETHER, in_groups
from tmm.kernels.fused.row_partials import FusedRow, Rows
from tmm.passes.findings import RowInput
from tmm.passes.graph.edits import add_placeholder
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.values import value_of
from tmm.passes.metrics.gradient_probe import Fused, Part, columns_of, spread_rows

FAMILY = ACTIVATION_GRADIENT.name


@dataclass(eq=False)
class Place:
    """A probe to be inserted: after which tap of which tensor, inside of which calls.

    ``fused`` says how the rows of the reductions are fused, or why they are not.
    """

    module: GraphModule
    calls: tuple[tuple[GraphModule, Node], ...]
    mark: Node
    tensor: Node
    reductions: tuple[Reduction, ...]
    fused: tuple[tuple[Rows, FusedRow] | str, ...] = ()
    sites: list[Site] = field(default_factory=list)
    copies: bool = False
    refusal: str = ""
    share: Share | None = None

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        device: torch.device = value_of(self.tensor).device
        return device


Row: TypeAlias = tuple[Place, int]
"""A row of a place: that of the reduction of that number."""


_OPERATOR, _PARTIALS, _TOGETHER = range(3)


def _kind(row: Row) -> tuple[int, str]:
    """How a row is computed, and its columns, if that is together with others."""
    place, index = row
    fused = place.fused[index]
    if fused == TOGETHER:
        return _TOGETHER, columns_of(place.reductions[index])
    return _OPERATOR if isinstance(fused, str) else _PARTIALS, ""


def ordered_rows(places: Sequence[Place]) -> list[Row]:
    """The rows of places, in the order in which they lie: by how they are computed."""
    rows = ((place, index) for place in places for index in range(len(place.reductions)))
    return sorted(rows, key=_kind)


def row_input_of(device: torch.device, rows: Sequence[Row]) -> RowInput:
    """The extra input that has these rows."""
    slots, start = [], 0
    for place, index in rows:
        reduction = place.reductions[index]
        slots += [
            Slot.of(Measurement(FAMILY, site, reduction, place.share), start)
            for site in place.sites
        ]
        start += reduction.width
    return RowInput(device, start, PackedLayout(tuple(slots), 1))


def add_row_input(module: GraphModule, row_input: RowInput, like: FakeTensor) -> Node:
    """The extra input, whose gradient will be the rows of all probes."""
    with like.fake_mode, torch.enable_grad():
        value = torch.zeros(
            row_input.length,
            dtype=packed_dtype(row_input.device),
            device=row_input.device,
            requires_grad=True,
        )
    return add_placeholder(module, f"tmm_gradient_rows_{row_input.device.type}", value)


def part_nodes(
    module: GraphModule, row_input: Node, place: Node, rows: Sequence[Row], *, scaled: bool
) -> list[Node]:
    """The extra input, cut into its ``rows``, after the node ``place``.

    Few operations, and as many in the backward pass, which join what comes back: gradients that are
    read together wait for one another, until they are many elements.
    """
    pieces = list(_pieces(rows))
    at = Rewriter(module.graph, place)
    cut = [row_input]
    if len(pieces) > 1:
        cut = _cut(at, torch.split, row_input, [sum(map(_width, piece)) for piece in pieces])
    found = []
    for node, piece in zip(cut, pieces, strict=True):
        kind, columns = _kind(piece[0])
        if kind == _OPERATOR:
            found += _cut(at, torch.split, node, list(map(_width, piece)))
        else:
            parts = [_part(row, scaled=scaled) for row in piece]
            found += _cut(at, spread_rows, node, parts, columns)
    return found


def _pieces(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that come about by one operation of the backward pass, or each by its own."""
    for (kind, _), some in itertools.groupby(rows, key=_kind):
        if kind == _TOGETHER:
            yield from in_groups(some, lambda row: value_of(row[0].tensor).numel())
        else:
            yield list(some)


def _cut(
    at: Rewriter, function: Callable[..., Sequence[torch.Tensor]], node: Node, *how: Any
) -> list[Node]:
    values = function(value_of(node), *how)
    cut = at.add("call_function", function, (node, *how), {}, values)
    return [
        at.add("call_function", operator.getitem, (cut, index), {}, value)
        for index, value in enumerate(values)
    ]


def _width(row: Row) -> int:
    place, index = row
    return place.reductions[index].width


def _part(row: Row, *, scaled: bool) -> Part:
    """What comes back as the gradient of a row that has no operator of its own."""
    place, index = row
    fused, example = place.fused[index], value_of(place.tensor)
    if isinstance(fused, str):
        dtype = torch.promote_types(example.dtype, torch.float32) if scaled else example.dtype
        return Part(_width(row), list(example.shape), dtype)
    _, partials = fused
    shape = [len(partials.partials), example.numel() // partials.length]
    return Part(_width(row), shape, partials.dtype, partials.layout)


def as_argument(fused: tuple[Rows, FusedRow] | str) -> Fused:
    """How a row comes about, as a probe takes it."""
    if isinstance(fused, str):
        return "together" if fused == TOGETHER else None
    rows, row = fused
    return row.arguments(rows)
