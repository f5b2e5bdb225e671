"""Append everything measured to a graph's outputs, packed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from tmm.core.metrics import Reduction
from tmm.core.records import Measurement, PackedLayout, Row, Site
from tmm.kernels.ops import pack
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.values import value_of
from tmm.passes.insert_reductions import CONSECUTIVE, MEASUREMENTS, SHARED, SharedRow
from tmm.passes.request import GraphRequest


def pack_rows(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Join all rows into one tensor per device and append it to the outputs of the graph.

    Tensors that leave whole (for callable aggregates and functions that are not traced) are
    appended after the packed ones. The graph's own outputs stay first and unchanged. Finds
    where each measurement lies; a graph without measurements is left as it is.
    """
    found.layout = _packed(module, tuple(found.unmeasured))


def _packed(module: GraphModule, unmeasured: tuple[tuple[Site, str], ...]) -> PackedLayout:
    packed: dict[torch.device, list[Node]] = {}
    whole: list[Node] = []
    for node in module.graph.nodes:
        if MEASUREMENTS in node.meta:
            if _measurements(node)[0].reduction.leaves_whole:
                whole.append(node)
            else:
                packed.setdefault(value_of(node).device, []).append(node)
    if not packed and not whole:
        return PackedLayout((), 0, unmeasured)

    output = module.graph.output_node()
    (returned,) = output.args
    assert isinstance(returned, (tuple, list))
    at = Rewriter(module.graph, output.prev)
    rows: list[tuple[Node, Row]] = []
    extra: list[Node] = []
    for nodes in packed.values():
        _group_by_reduction(nodes)
        start = 0
        for node in nodes:
            rows += [(node, row) for row in _rows(node, len(extra), start)]
            start += int(value_of(node).numel())
        extra.append(at.call(pack, nodes))
    for node in whole:
        rows += [(node, Row(m, len(extra))) for m in _measurements(node)]
        extra.append(node)
    output.args = ((*returned, *extra),)

    for node, _ in rows:
        node.meta.pop(MEASUREMENTS, None)
        node.meta.pop(SHARED, None)
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    rows.sort(key=lambda item: order[item[0]])
    return PackedLayout(tuple(row for _, row in rows), len(extra), unmeasured)


def _group_by_reduction(nodes: list[Node]) -> None:
    """Order nodes so that rows of one reduction lie one after the other: nobody gathers them."""
    places: dict[Reduction, int] = {}
    for node in nodes:
        places.setdefault(_measurements(node)[0].reduction, len(places))
    nodes.sort(key=lambda node: places[_measurements(node)[0].reduction])


def _rows(node: Node, output: int, start: int) -> Iterator[Row]:
    """The rows that a node holds, whose first number is at ``start`` of an output."""
    shared: SharedRow | None = node.meta.get(SHARED)
    for measurement in _measurements(node):
        width = measurement.reduction.width
        if shared is None:
            yield Row(measurement, output, range(start, start + width))
        else:
            indices = tuple(start + offset for offset in shared.offsets(measurement.reduction))
            yield Row(measurement, output, indices, shared.known.get(measurement.reduction))
        if node.meta.get(CONSECUTIVE):
            start += width


def _measurements(node: Node) -> tuple[Measurement, ...]:
    measurements: tuple[Measurement, ...] = node.meta[MEASUREMENTS]
    return measurements
