"""Append everything measured to a graph's outputs, packed."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from tmm.layout import Measurement, PackedLayout, Row, Site
from tmm.operators import pack
from tmm.passes.insert_reductions import CONSECUTIVE, MEASUREMENTS


def pack_rows(
    module: GraphModule, *, unmeasured: tuple[tuple[Site, str], ...] = ()
) -> PackedLayout:
    """Join all rows into one tensor per device and append it to the outputs of the graph.

    Tensors that leave whole (for callable aggregates and functions that are not traced) are
    appended after the packed ones. The graph's own outputs stay first and unchanged. Returns
    where each measurement lies; a graph without measurements is left as it is.
    """
    packed: dict[torch.device, list[Node]] = {}
    whole: list[Node] = []
    for node in module.graph.nodes:
        if MEASUREMENTS in node.meta:
            if _measurements(node)[0].reduction.leaves_whole:
                whole.append(node)
            else:
                packed.setdefault(node.meta["example_value"].device, []).append(node)
    if not packed and not whole:
        return PackedLayout((), 0, unmeasured)

    output = module.graph.output_node()
    (returned,) = output.args
    assert isinstance(returned, (tuple, list))
    rows: list[tuple[Node, Row]] = []
    extra: list[Node] = []
    for nodes in packed.values():
        start = 0
        for node in nodes:
            for measurements in _slices(node):
                stop = start + measurements[0].reduction.width
                rows += [(node, Row(m, len(extra), start, stop)) for m in measurements]
                start = stop
        with module.graph.inserting_before(output):
            extra.append(module.graph.call_function(pack, (nodes,)))
        extra[-1].meta["example_value"] = pack([node.meta["example_value"] for node in nodes])
    for node in whole:
        rows += [(node, Row(m, len(extra))) for m in _measurements(node)]
        extra.append(node)
    output.args = ((*returned, *extra),)

    for node, _ in rows:
        node.meta.pop(MEASUREMENTS, None)
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    rows.sort(key=lambda item: order[item[0]])
    return PackedLayout(tuple(row for _, row in rows), len(extra), unmeasured)


def _slices(node: Node) -> list[tuple[Measurement, ...]]:
    """The measurements of each row that a node holds."""
    measurements = _measurements(node)
    if node.meta.get(CONSECUTIVE):
        return [(measurement,) for measurement in measurements]
    return [measurements]


def _measurements(node: Node) -> tuple[Measurement, ...]:
    measurements: tuple[Measurement, ...] = node.meta[MEASUREMENTS]
    return measurements
