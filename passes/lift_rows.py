"""Bring rows out of nested graphs."""

from __future__ import annotations

import operator

from torch.fx import GraphModule

from tmm.passes.findings import GraphFindings
from tmm.passes.graph.fused_rows import fused_of, set_fused
from tmm.passes.graph.provenance import copy_sites
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.slots import add_slots, slots_of, take_slots
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.values import set_value, value_of
from tmm.passes.request import GraphRequest


def lift_rows(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Make each row of a nested graph an extra output of it, and an item of its call's result.

    Afterwards every row stands in ``module.graph`` itself, and nested graphs hold no measurements.
    A row inside activation checkpointing is computed once: it is no input of the recomputation's
    results.
    """
    for call, body in list(nested_calls(module)):
        if not returns_body_outputs(call):
            continue
        lift_rows(body, request, found)
        rows = [node for node in body.graph.nodes if slots_of(node)]
        output = body.graph.output_node()
        (returned,) = output.args
        assert isinstance(returned, (tuple, list))
        output.args = ((*returned, *rows),)
        body.recompile()
        set_value(call, (*value_of(call), *map(value_of, rows)))
        at = Rewriter(module.graph, call)
        for index, row in enumerate(rows, start=len(returned)):
            position = at.call(operator.getitem, call, index)
            add_slots(position, *take_slots(row))
            set_fused(position, fused_of(row))
            copy_sites(row, position)
