"""Append everything measured to a graph's outputs, packed."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from tmm.core.metrics import Reduction
from tmm.core.records import PackedLayout, Site, Slot
from tmm.kernels.fused.merge_operator import merge_parts
from tmm.kernels.ops import pack
from tmm.kernels.summarize.many import summarize_many
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.fused_rows import fused_of
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.slots import slots_of, take_slots
from tmm.passes.graph.values import set_value, value_of
from tmm.passes.graph.written_rows import write_rows
from tmm.passes.request import GraphRequest


def pack_rows(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Join all rows into one tensor per device and append it to the outputs of the graph.

    Tensors that leave whole (for callable aggregates and functions that are not traced) are
    appended after the packed ones. The graph's own outputs stay first and unchanged. Finds
    where each measurement lies; a graph without measurements is left as it is. Where operators
    write in place, the rows of a CPU are written into the tensor that would join them. Partials are
    merged by one operator, into a tensor of their own.
    """
    found.layout = _packed(module, tuple(found.unmeasured), writes_in_place=request.writes_in_place)


def _packed(
    module: GraphModule, unmeasured: tuple[tuple[Site, str], ...], *, writes_in_place: bool
) -> PackedLayout:
    packed: dict[tuple[torch.device, bool], list[Node]] = {}
    whole: list[Node] = []
    for node in module.graph.nodes:
        if slots_of(node):
            if _reduction(node).leaves_whole:
                whole.append(node)
            else:
                kind = value_of(node).device, fused_of(node) is not None
                packed.setdefault(kind, []).append(node)
    if not packed and not whole:
        return PackedLayout((), 0, unmeasured)

    output = module.graph.output_node()
    (returned,) = output.args
    assert isinstance(returned, (tuple, list))
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    slots: list[tuple[Node, Slot]] = []
    extra: list[Node] = []
    for (device, is_fused), nodes in packed.items():
        _group_by_reduction(nodes)
        start = 0
        for node in nodes:
            slots += [(node, slot.at(len(extra), start)) for slot in slots_of(node)]
            row = fused_of(node)
            start += int(value_of(node).numel()) if row is None else row.width
        if is_fused:
            extra.append(_merge(module, nodes))
        elif [node.target for node in nodes] == [summarize_many]:
            extra += nodes  # joined, and of nobody else's memory
        else:
            in_place = writes_in_place and device.type == "cpu"
            extra.append((write_rows if in_place else _join)(module, nodes))
    for node in whole:
        slots += [(node, slot.at(len(extra))) for slot in slots_of(node)]
        extra.append(node)
    output.args = ((*returned, *extra),)

    for node in module.graph.nodes:
        take_slots(node)
    slots.sort(key=lambda item: order[item[0]])
    return PackedLayout(tuple(slot for _, slot in slots), len(extra), unmeasured)


def _join(module: GraphModule, rows: list[Node]) -> Node:
    with module.graph.inserting_before(module.graph.output_node()):
        joined = module.graph.call_function(pack, (rows,))
    set_value(joined, pack([value_of(row) for row in rows]))
    return joined


def _merge(module: GraphModule, rows: list[Node]) -> Node:
    layout = [number for row in map(fused_of, rows) if row is not None for number in row.layout]
    at = Rewriter(module.graph, module.graph.output_node().prev)
    return at.call(merge_parts, rows, layout)


def _group_by_reduction(nodes: list[Node]) -> None:
    """Order nodes so that rows of one reduction lie one after the other: nobody gathers them."""
    places: dict[Reduction, int] = {}
    for node in nodes:
        places.setdefault(_reduction(node), len(places))
    nodes.sort(key=lambda node: places[_reduction(node)])


def _reduction(node: Node) -> Reduction:
    return slots_of(node)[0].measurement.reduction
