"""Insert a reduction after each marked tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from tmm.core.families import ACTIVATION, VALUE_FAMILY
from tmm.core.metrics import COLUMN_ORDER, COLUMN_SEPARATOR, KnownMetric, Reduction
from tmm.core.records import Measurement, Site, Slot
from tmm.core.torch_private import enter_inference_mode, exit_inference_mode
from tmm.kernels.ops import (
    copy,
    histogram,
    summarize,
    tap_attention,
    tap_input,
    tap_value,
)
from tmm.kernels.unreadable import why_unmeasurable, why_unreadable
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.provenance import add_site
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.sharding import Placements, is_distributed, why_unsummed
from tmm.passes.graph.slots import add_slots
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import is_mark, site_of
from tmm.passes.graph.values import value_of
from tmm.passes.metrics.recognize import recognize
from tmm.passes.metrics.trace import (
    MetricFunctionError,
    TracedFunction,
    insert_traced,
    trace_function,
)
from tmm.passes.request import GraphRequest

_MEASURED = "tmm_measured"


@dataclass(frozen=True)
class _Row:
    """A row of a reduction, as a ``node`` computes it: some of its numbers, or all of them.

    ``known`` says what the function of the reduction computes. Of one that is to run eagerly the
    reduction has lost its ``trace``.
    """

    node: Node
    reduction: Reduction
    indices: Sequence[int] | None = None
    known: KnownMetric | None = None

    def slot(self, measurement: Measurement) -> Slot:
        """The slot of a measurement of this row."""
        measurement = replace(measurement, reduction=self.reduction)
        if self.indices is None:
            return Slot.of(measurement)
        return Slot(measurement, self.indices, self.known)


def insert_reductions(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """After each tap, insert the nodes that reduce the tapped tensor to rows.

    Afterwards each inserted row carries its measurements in ``node.meta``, and each inserted node
    the sites that it serves. Reductions come
    directly after the tap, so that a later in-place operation cannot change what is measured.
    Taps of one tensor with no computation between them share their rows. Taps stay in the graph.
    Finds the sites that were selected but have no rows, each with the reason.
    """
    found.unmeasured += _insert(module, request, found.placements, [])


def _insert(
    module: GraphModule,
    request: GraphRequest,
    placements: Placements | None,
    modes: list[bool],
) -> Iterator[tuple[Site, str]]:
    bodies: dict[Node, list[GraphModule]] = {}
    for call, body in nested_calls(module):
        bodies.setdefault(call, []).append(body)
    computed: dict[tuple[Node, Reduction], _Row] = {}
    for node in list(module.graph.nodes):
        if node.target in (tap_input, tap_attention):
            continue
        if node.target is enter_inference_mode:
            modes.append(node.args[0] is True)
        elif node.target is exit_inference_mode:
            modes.pop()
        if is_mark(node):
            if not node.meta.setdefault(_MEASURED, False):
                node.meta[_MEASURED] = True
                # AOTAutograd cannot trace a view of a tensor from outside of inference mode in it.
                reads = copy if modes and modes[-1] else "detach"
                yield from _measure(module, node, request, placements, computed, reads)
        elif node.op not in ("placeholder", "get_attr"):
            computed.clear()
        for body in bodies.get(node, ()):
            if returns_body_outputs(node):
                yield from _insert(body, request, placements, modes)
            else:
                yield from _refuse(body, request, f"inside {node.target}")


def _measure(
    module: GraphModule,
    node: Node,
    request: GraphRequest,
    placements: Placements | None,
    computed: dict[tuple[Node, Reduction], _Row],
    reads: Callable[..., torch.Tensor] | str,
) -> Iterator[tuple[Site, str]]:
    tensor = node.args[0]
    assert isinstance(tensor, Node)
    example = value_of(tensor)
    site, wanted = _mark(node, request, example.dtype)
    reductions = tuple(dict.fromkeys(reduction for _, reduction in wanted))
    if not wanted:
        return
    reason = (why_unreadable if node.target is tap_value else why_unmeasurable)(example)
    share = None if placements is None else placements.share(node)
    if share is not None and share.kind == "unsummed":
        reason = reason or share.reason
    reason = reason or why_unsummed(example)
    if reason:
        yield site, reason
        return
    if is_distributed(example) and _is_empty(example.to_local()):
        # An empty shard adds nothing, and functions need not know what to do with it.
        wanted = [(family, reduction) for family, reduction in wanted if reduction.function is None]
        reductions = tuple(reduction for reduction in reductions if reduction.function is None)
    at = Rewriter(module.graph, node)
    fresh = [reduction for reduction in reductions if (tensor, reduction) not in computed]
    if fresh:
        value = at.call(reads, tensor)
        if is_distributed(example):
            value = at.call("to_local", value)
        if example.is_nested:
            value = at.call("values", value)
        for row in _reduce(value, fresh):
            computed[tensor, row.reduction] = row
    for family, reduction in wanted:
        row = computed[tensor, reduction]
        if reduction not in fresh:
            add_site(row.node, family, site)
        add_slots(row.node, row.slot(Measurement(family, site, reduction, share)))
    for family in dict.fromkeys(family for family, _ in wanted):
        at.credit(family, site)


def _reduce(value: Node, reductions: Sequence[Reduction]) -> Iterator[_Row]:
    """Insert the nodes of the reductions after ``value``; gives the row of each.

    Functions that compute what tmm knows share one row with the built-in metrics. Those that are
    to run eagerly get a copy of the tensor, and lose their ``trace``.
    """
    example = value_of(value)
    functions = {r: _traced(example, r) for r in reductions if r.function is not None and r.trace}
    known: dict[Reduction, KnownMetric] = {}
    for reduction, traced in functions.items():
        metric = None if traced is None else recognize(traced.graph)
        if metric is not None and metric.can_serve(reduction):
            known[reduction] = metric
    if known:
        builtin = [r for r in reductions if r.function is None and not r.is_histogram]
        yield from _share(value, builtin, known)
        reductions = [r for r in reductions if r not in known and r not in builtin]
    for reduction in reductions:
        function = functions.get(reduction)
        if reduction.function is None:
            yield _Row(_summarize(value, reduction.columns), reduction)
        elif function is None:
            yield _Row(_behind(value, copy), replace(reduction, trace=False))
        else:
            result = insert_traced(Rewriter(value.graph, value), function, (value,))
            if not reduction.collects_values:
                yield _Row(_summarize(result, reduction.columns), reduction)
                continue
            # A copy, not a view of what a later operation may overwrite.
            yield _Row(_behind(result, copy), reduction)


def _share(
    value: Node, builtin: Sequence[Reduction], known: Mapping[Reduction, KnownMetric]
) -> Iterator[_Row]:
    """One row for built-in reductions and functions that compute what tmm knows."""
    asked = {r: r.columns for r in builtin} | {r: known[r].columns for r in known}
    needed = {column for columns in asked.values() for column in columns}
    shared = tuple(column for column in COLUMN_ORDER if column in needed)
    row = _summarize(value, shared)
    for reduction, columns in asked.items():
        yield _Row(row, reduction, [shared.index(name) for name in columns], known.get(reduction))


def _is_empty(example: torch.Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in example.shape)


def _traced(example: torch.Tensor, reduction: Reduction) -> TracedFunction | None:
    """The operations of a function; None for one that is to run eagerly, then."""
    try:
        return trace_function(example, reduction)
    except MetricFunctionError:
        if not reduction.falls_back:
            raise
        return None


def _summarize(value: Node, columns: Sequence[str]) -> Node:
    """Insert the row of these columns, or of a histogram, which has none."""
    if not columns:
        return _behind(value, histogram)
    return _behind(value, summarize, COLUMN_SEPARATOR.join(columns))


def _behind(value: Node, function: Callable[..., torch.Tensor], *arguments: str) -> Node:
    return Rewriter(value.graph, value).call(function, value, *arguments)


def _refuse(module: GraphModule, request: GraphRequest, reason: str) -> Iterator[tuple[Site, str]]:
    for node in module.graph.nodes:
        if is_mark(node) and node.target not in (tap_input, tap_attention):
            site, wanted = _mark(node, request, torch.float32)
            if wanted:
                yield site, reason
    for _, body in nested_calls(module):
        yield from _refuse(body, request, reason)


def _mark(
    node: Node, request: GraphRequest, dtype: torch.dtype
) -> tuple[Site, list[tuple[str, Reduction]]]:
    """The site that a tap marks, and what is wanted of it: reductions, each for a family."""
    if node.target is tap_value:
        name = str(node.args[1])
        return Site(name), [(VALUE_FAMILY, request.values[name])]
    site = site_of(node, request.modules)
    if site is None:
        return Site(""), []
    selects = {ACTIVATION.name: request.select, **request.select_further}
    found = ((family, select(site, dtype)) for family, select in selects.items())
    return site, [(family, reduction) for family, some in found for reduction in some]
