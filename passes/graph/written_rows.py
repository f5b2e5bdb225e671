"""Rows that are written into one tensor as they come about, so that nobody joins them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Argument

from tmm.kernels.ops import put, summarize, summarize_into
from tmm.passes.graph.provenance import copy_sites
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.values import set_value, value_of


def write_rows(module: GraphModule, rows: Sequence[Node]) -> Node:
    """The node of a tensor that holds ``rows`` of a CPU, one after the other.

    Reductions of a tensor to a row become such as write into it, in their places; what others
    compute is put there before the graph ends.
    """
    graph = module.graph
    first = min(rows, key={node: index for index, node in enumerate(graph.nodes)}.__getitem__)
    values = [value_of(row) for row in rows]
    length = sum(value.numel() for value in values)
    with graph.inserting_before(first):
        together = graph.call_function(
            torch.empty, (length,), {"dtype": values[0].dtype, "device": values[0].device}
        )
    set_value(together, values[0].new_empty(length))
    start, waiting = 0, _Waiting(graph, together)
    for row, value in zip(rows, values, strict=True):
        if row.target is summarize and not row.users and not _is_of_complex(row):
            waiting.put()
            arguments = (together, start, *row.args)
            copy_sites(row, _call_nothing(graph, row, summarize_into, arguments))
            graph.erase_node(row)
        else:
            waiting.add(start, row)
        start += value.numel()
    waiting.put()
    return together


def _is_of_complex(row: Node) -> bool:
    """Whether a complex tensor is reduced: Inductor cannot compile what gets one and writes."""
    (source, *_) = row.args
    return isinstance(source, Node) and value_of(source).is_complex()


class _Waiting:
    """Rows that others compute, and that lie one after the other."""

    def __init__(self, graph: Graph, together: Node) -> None:
        self._graph = graph
        self._together = together
        self._start = 0
        self._rows: list[Node] = []

    def add(self, start: int, row: Node) -> None:
        """One more, which begins at ``start``."""
        if not self._rows:
            self._start = start
        self._rows.append(row)

    def put(self) -> None:
        """Put them where they belong."""
        if self._rows:
            arguments = (self._together, self._start, self._rows)
            _call_nothing(self._graph, self._graph.output_node().prev, put, arguments)
            self._rows = []


def _call_nothing(
    graph: Graph, place: Node, target: Callable[..., None], arguments: Sequence[Argument]
) -> Node:
    """Call what gives nothing, so that nothing need be computed to know it."""
    return Rewriter(graph, place).add("call_function", target, arguments, {}, None)
