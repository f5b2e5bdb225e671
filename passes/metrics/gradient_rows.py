"""The rows of gradients: how they lie in the extra input, and what comes back as them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from tmm.core.families import ACTIVATION_GRADIENT
from tmm.core.metrics import Reduction
from tmm.core.records import Measurement, PackedLayout, Share, Site, Slot
from tmm.core.torch_private import FakeTensor
from tmm.kernels.dense import packed_dtype
from tmm.kernels.fused.choose_lowering import TOGETHER, WAITING
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


def ordered_rows(places: Sequence[Place]) -> list[Row]:
    """The rows of places, in the order in which they lie: by how they are computed."""
    rows = [(place, index) for place in places for index in range(len(place.reductions))]

    def kind(row: Row) -> tuple[int, str]:
        place, index = row
        fused = place.fused[index]
        if fused == TOGETHER:
            return 2, columns_of(place.reductions[index])
        return int(not isinstance(fused, str)), ""

    return sorted(rows, key=kind)


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
    pieces: list[list[Part]] = [[]]
    waiting = 0
    for each, index in rows:
        part = _part(each, index, scaled=scaled)
        if part[2]:
            elements = value_of(each.tensor).numel()
            if not waiting or waiting + elements > WAITING:
                pieces.append([])
                waiting = 0
            waiting += elements
        pieces[-1].append(part)
    pieces = [piece for piece in pieces if piece]
    at = Rewriter(module.graph, place)
    cut = [row_input]
    if len(pieces) > 1:
        cut = _cut(at, torch.split, row_input, [sum(part[0] for part in piece) for piece in pieces])
    found = []
    for node, piece in zip(cut, pieces, strict=True):
        if any(dtype is not None for *_, dtype in piece):
            found += _cut(at, spread_rows, node, piece)
        else:
            found += _cut(at, torch.split, node, [width for width, *_ in piece])
    return found


def _cut(
    at: Rewriter, function: Callable[..., Sequence[torch.Tensor]], node: Node, parts: Sequence[Any]
) -> list[Node]:
    values = function(value_of(node), parts)
    cut = at.add("call_function", function, (node, parts), {}, values)
    return [
        at.add("call_function", operator.getitem, (cut, index), {}, value)
        for index, value in enumerate(values)
    ]


def _part(place: Place, index: int, *, scaled: bool) -> Part:
    """What comes back as the gradient of a row of a place."""
    reduction, fused, example = place.reductions[index], place.fused[index], value_of(place.tensor)
    if fused == TOGETHER:
        dtype = torch.promote_types(example.dtype, torch.float32) if scaled else example.dtype
        return reduction.width, [], columns_of(reduction), list(example.shape), dtype
    if isinstance(fused, str):
        return reduction.width, [], "", [], None
    _, row = fused
    shape = [len(row.partials), example.numel() // row.length]
    return reduction.width, row.layout, "", shape, row.dtype


def as_argument(fused: tuple[Rows, FusedRow] | str) -> Fused:
    """How a row comes about, as a probe takes it."""
    if isinstance(fused, str):
        return "together" if fused == TOGETHER else None
    rows, row = fused
    return row.arguments(rows)
