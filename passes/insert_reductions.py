"""Insert a reduction after each marked tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, GraphModule, Node

from tmm.layout import VALUE_FAMILY, Measurement, Site
from tmm.metrics import Reduction
from tmm.operators import (
    COLUMN_SEPARATOR,
    copy,
    histogram,
    summarize,
    tap_attention,
    tap_input,
    tap_value,
    why_unmeasurable,
    why_unreadable,
)
from tmm.passes.marks import is_mark, site_of
from tmm.passes.nesting import nested_calls, returns_body_outputs
from tmm.passes.origin import add_site
from tmm.passes.trace_function import MetricFunctionError, insert_call, insert_function

MEASUREMENTS = "tmm_measurements"
"""Node metadata: the measurements whose row (or whole values) the node computes."""

CONSECUTIVE = "tmm_consecutive"
"""Node metadata: the rows of the measurements lie one after the other; else they are the same."""

_MEASURED = "tmm_measured"


@dataclass(frozen=True)
class ReductionOptions:
    """What ``insert_reductions`` measures.

    ``modules`` gives the relative name of each module by its ``id``; ``select`` the reductions of
    a site of a given dtype; ``values`` that of each value recorded by name.
    """

    modules: Mapping[int, str]
    select: Callable[[Site, torch.dtype], tuple[Reduction, ...]]
    values: Mapping[str, Reduction] = field(default_factory=dict)


def insert_reductions(
    module: GraphModule, *, options: ReductionOptions
) -> tuple[tuple[Site, str], ...]:
    """After each tap, insert the nodes that reduce the tapped tensor to rows.

    Afterwards each inserted row carries its measurements in ``node.meta``, and each inserted node
    the sites that it serves. Reductions come
    directly after the tap, so that a later in-place operation cannot change what is measured.
    Taps of one tensor with no computation between them share their rows. Taps stay in the graph.
    Returns the sites that were selected but have no rows, each with the reason.
    """
    return tuple(_insert(module, options))


def _insert(module: GraphModule, options: ReductionOptions) -> Iterator[tuple[Site, str]]:
    bodies: dict[Node, list[GraphModule]] = {}
    for call, body in nested_calls(module):
        bodies.setdefault(call, []).append(body)
    computed: dict[tuple[Node, Reduction], tuple[Node, Reduction]] = {}
    for node in list(module.graph.nodes):
        if node.target in (tap_input, tap_attention):
            continue
        if is_mark(node):
            if not node.meta.setdefault(_MEASURED, False):
                node.meta[_MEASURED] = True
                yield from _measure(module, node, options, computed)
        elif node.op not in ("placeholder", "get_attr"):
            computed.clear()
        for body in bodies.get(node, ()):
            if returns_body_outputs(node):
                yield from _insert(body, options)
            else:
                yield from _refuse(body, options, f"inside {node.target}")


def _measure(
    module: GraphModule,
    node: Node,
    options: ReductionOptions,
    computed: dict[tuple[Node, Reduction], tuple[Node, Reduction]],
) -> Iterator[tuple[Site, str]]:
    tensor = node.args[0]
    assert isinstance(tensor, Node)
    example = tensor.meta["example_value"]
    family, site, reductions = _mark(node, options, example.dtype)
    if not reductions:
        return
    reason = (why_unreadable if node.target is tap_value else why_unmeasurable)(example)
    if reason:
        yield site, reason
        return
    following = node.next
    value: Node | None = None
    for reduction in reductions:
        known = computed.get((tensor, reduction))
        if known is not None:
            row, reduction = known
            add_site(row, family, site)
        else:
            if value is None:
                with module.graph.inserting_after(node):
                    value = insert_call(module.graph, "detach", tensor)
                if example.is_nested:
                    with module.graph.inserting_after(value):
                        value = insert_call(module.graph, "values", value)
            row, ran = computed[tensor, reduction] = _reduce(module.graph, value, reduction)
            row.meta[MEASUREMENTS], reduction = (), ran
        row.meta[MEASUREMENTS] += (Measurement(family, site, reduction),)
    inserted = node.next
    while inserted is not following:
        add_site(inserted, family, site)
        inserted = inserted.next


def _reduce(graph: Graph, value: Node, reduction: Reduction) -> tuple[Node, Reduction]:
    """Insert the nodes of one reduction after ``value`` and give back the last of them.

    That is a copy of the tensor for a function that is to run eagerly, as is told, too.
    """
    if reduction.function is not None:
        with graph.inserting_after(value):
            try:
                if reduction.trace:
                    value = insert_function(graph, value, reduction)
            except MetricFunctionError:
                if not reduction.falls_back:
                    raise
                reduction = replace(reduction, trace=False)
            if not reduction.trace:
                return insert_call(graph, copy, value), reduction
        if reduction.collects_values:
            # A copy, not a view of what a later operation may overwrite.
            with graph.inserting_after(value):
                return insert_call(graph, copy, value), reduction
    with graph.inserting_after(value):
        if reduction.is_histogram:
            return insert_call(graph, histogram, value), reduction
        columns = COLUMN_SEPARATOR.join(reduction.columns)
        return insert_call(graph, summarize, value, columns), reduction


def _refuse(
    module: GraphModule, options: ReductionOptions, reason: str
) -> Iterator[tuple[Site, str]]:
    for node in module.graph.nodes:
        if is_mark(node) and node.target not in (tap_input, tap_attention):
            _, site, reductions = _mark(node, options, torch.float32)
            if reductions:
                yield site, reason
    for _, body in nested_calls(module):
        yield from _refuse(body, options, reason)


def _mark(
    node: Node, options: ReductionOptions, dtype: torch.dtype
) -> tuple[str, Site, tuple[Reduction, ...]]:
    """What a tap marks: family, site, and the reductions that are wanted of it."""
    if node.target is tap_value:
        name = str(node.args[1])
        return VALUE_FAMILY, Site(name), (options.values[name],)
    site = site_of(node, options.modules)
    if site is None:
        return "activation", Site(""), ()
    return "activation", site, options.select(site, dtype)
