"""Insert a reduction after each marked tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from tmm.layout import Measurement, Site
from tmm.metrics import Reduction
from tmm.operators import COLUMN_SEPARATOR, histogram, summarize, tap, why_unmeasurable
from tmm.passes.nesting import nested_calls, returns_body_outputs
from tmm.passes.trace_function import insert_call, insert_function

MEASUREMENTS = "tmm_measurements"
"""Node metadata: the measurements whose row (or whole values) the node computes."""

_MEASURED = "tmm_measured"


@dataclass(frozen=True)
class ReductionOptions:
    """What ``insert_reductions`` measures.

    ``modules`` gives the relative name of each module by its ``id``; ``select`` the reductions of
    a module's output of a given dtype; ``compiled`` chooses the compiled kernel for them.
    """

    modules: Mapping[int, str]
    select: Callable[[str, torch.dtype], tuple[Reduction, ...]]
    family: str = "activation"
    compiled: bool = False


def insert_reductions(
    module: GraphModule, *, options: ReductionOptions
) -> tuple[tuple[Site, str], ...]:
    """After each tap, insert the nodes that reduce the tapped tensor to rows.

    Afterwards each inserted row carries its measurements in ``node.meta``. Reductions come
    directly after the tap, so that a later in-place operation cannot change what is measured.
    Taps of one tensor with no computation between them share their rows. Taps stay in the graph.
    Returns the sites that were selected but have no rows, each with the reason.
    """
    return tuple(_insert(module, options))


def _insert(module: GraphModule, options: ReductionOptions) -> Iterator[tuple[Site, str]]:
    bodies: dict[Node, list[GraphModule]] = {}
    for call, body in nested_calls(module):
        bodies.setdefault(call, []).append(body)
    computed: dict[tuple[Node, Reduction], Node] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target is tap:
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
    computed: dict[tuple[Node, Reduction], Node],
) -> Iterator[tuple[Site, str]]:
    site = _site(node, options)
    if site is None:
        return
    tensor = node.args[0]
    assert isinstance(tensor, Node)
    example = tensor.meta["example_value"]
    reductions = options.select(site.module, example.dtype)
    if reductions and (reason := why_unmeasurable(example)):
        yield site, reason
        return
    value: Node | None = None
    for reduction in reductions:
        row = computed.get((tensor, reduction))
        if row is None:
            if value is None:
                with module.graph.inserting_after(node):
                    value = insert_call(module.graph, "detach", tensor)
                if example.is_nested:
                    with module.graph.inserting_after(value):
                        value = insert_call(module.graph, "values", value)
            row = computed[tensor, reduction] = _reduce(module.graph, value, reduction, options)
            row.meta[MEASUREMENTS] = ()
        row.meta[MEASUREMENTS] += (Measurement(options.family, site, reduction),)


def _reduce(graph: Graph, value: Node, reduction: Reduction, options: ReductionOptions) -> Node:
    """Insert the nodes of one reduction after ``value`` and give back the last of them."""
    if reduction.function is not None:
        with graph.inserting_after(value):
            if not reduction.trace:
                return insert_call(graph, "clone", value)
            value = insert_function(graph, value, reduction)
        if reduction.collects_values:
            return value
    with graph.inserting_after(value):
        if reduction.is_histogram:
            return insert_call(graph, histogram, value)
        columns = COLUMN_SEPARATOR.join(reduction.columns)
        return insert_call(graph, summarize, value, columns, options.compiled)


def _refuse(
    module: GraphModule, options: ReductionOptions, reason: str
) -> Iterator[tuple[Site, str]]:
    for node in module.graph.find_nodes(op="call_function", target=tap):
        site = _site(node, options)
        if site is not None and options.select(site.module, torch.float32):
            yield site, reason
    for _, body in nested_calls(module):
        yield from _refuse(body, options, reason)


def _site(node: Node, options: ReductionOptions) -> Site | None:
    """The site that a tap marks; None for a module that has no name here."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    identity = next(reversed(stack)).partition("@")[0]  # a repeated call is marked with "@n"
    name = options.modules.get(int(identity))
    return None if name is None else Site(name, str(node.args[1]))
