"""Insert a probe at each marked tensor, which measures its gradient in the backward pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from tmm.core.families import ACTIVATION_GRADIENT
from tmm.core.metrics import Reduction
from tmm.core.records import Measurement, PackedLayout, Share, Site, Slot
from tmm.core.torch_private import FakeTensor
from tmm.kernels.dense import packed_dtype
from tmm.kernels.fused.choose_lowering import TOGETHER, WAITING, fused_row
from tmm.kernels.fused.row_partials import FusedRow, Rows
from tmm.kernels.ops import tap
from tmm.kernels.unreadable import why_unmeasurable
from tmm.passes.findings import GraphFindings, RowInput
from tmm.passes.graph.edits import add_placeholder, storages, written
from tmm.passes.graph.provenance import sites_of
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.sharding import is_distributed
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import is_mark, site_of
from tmm.passes.graph.values import value_of
from tmm.passes.metrics.gradient_probe import (
    FunctionProbe,
    Fused,
    Part,
    columns_of,
    probe,
    spread_rows,
)
from tmm.passes.metrics.trace import trace_function
from tmm.passes.request import GraphRequest

FAMILY = ACTIVATION_GRADIENT.name

WITHOUT_GRADIENT = "the module gives back what it was given, inside of torch.no_grad"
"""Why a tensor that requires a gradient has no probe: it would hand on none."""

_PROBED = "tmm_probed"


@dataclass(eq=False)
class _Place:
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
        device: torch.device = value_of(self.tensor).device
        return device


_Row: TypeAlias = tuple[_Place, int]
"""A row of a place: that of the reduction of that number."""


def insert_probes(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """After each tap of a tensor that requires a gradient, pass the tensor through a probe.

    Afterwards whatever used the tensor later uses the probe's result, and the graph has one more
    input per device, last, whose gradient holds the rows. Taps of one tensor with no computation
    between them share a probe. Taps stay in the graph. A graph without such tensors is left alone.
    A tensor that is overwritten or returned while it is known under another name has no probe: the
    program would become another one. Finds the extra inputs, and such sites with the reason.
    """
    all_places = list(_places(module, request, found.gradient_shares, ()))
    places = [place for place in all_places if not place.refusal]
    for device in dict.fromkeys(place.device for place in places):
        here = [place for place in places if place.device == device]
        rows = _ordered(here)
        row_input = _row_input(device, rows)
        found.row_inputs += (row_input,)
        given = _add_input(module, row_input, value_of(here[0].tensor))
        factor = None
        if request.scales_gradients:
            factor = Rewriter(module.graph, given).call(_first, given)
        parts = _part_nodes(module, given, factor or given, rows, scaled=factor is not None)
        nodes = dict(zip(rows, parts, strict=True))
        for place in here:
            own = [_inside(place.calls, nodes[place, i]) for i in range(len(place.reductions))]
            _insert(place, own, None if factor is None else _inside(place.calls, factor))
            if request.fuses:
                found.lowerings += (
                    (FAMILY, site, fused if isinstance(fused, str) else "")
                    for fused in place.fused
                    for site in place.sites
                )
    found.unmeasured += (
        (site, f"gradient: {place.refusal}")
        for place in all_places
        if place.refusal
        for site in place.sites
    )


def _places(
    module: GraphModule,
    request: GraphRequest,
    shares: Mapping[Node, Share] | None,
    calls: tuple[tuple[GraphModule, Node], ...],
) -> Iterator[_Place]:
    bodies: dict[Node, list[GraphModule]] = {}
    for call, body in nested_calls(module):
        bodies.setdefault(call, []).append(body)
    returned, overwritten = storages(module.graph.output_node().all_input_nodes), written(module)
    recent: dict[Node, _Place] = {}
    for node in module.graph.nodes:
        if is_mark(node):
            place = _place(module, request, shares, calls, node, returned, overwritten)
            if place is None:
                continue
            known = recent.get(place.tensor)
            if known is not None and known.reductions == place.reductions and not place.refusal:
                known.sites += place.sites
            else:
                recent[place.tensor] = place
                yield place
        elif _computes(node):
            recent.clear()
        for body in bodies.get(node, ()):
            if returns_body_outputs(node):
                yield from _places(body, request, shares, (*calls, (module, node)))


def _place(
    module: GraphModule,
    request: GraphRequest,
    shares: Mapping[Node, Share] | None,
    calls: tuple[tuple[GraphModule, Node], ...],
    mark: Node,
    returned: set[int],
    overwritten: set[int],
) -> _Place | None:
    tensor = mark.args[0]
    assert isinstance(tensor, Node)
    example = value_of(tensor)
    site = site_of(mark, request.modules) if mark.target is tap else None
    requires_grad, is_grad_enabled = mark.args[2:] or (example.requires_grad, True)
    if site is None or not requires_grad or why_unmeasurable(example) or example.is_nested:
        return None
    if mark.meta.get(_PROBED):
        return None
    assert request.select_gradient is not None
    reductions = request.select_gradient(site, example.dtype)
    if not reductions:
        return None
    mark.meta[_PROBED] = True
    fused = tuple(_fused(example, reduction, request) for reduction in reductions)
    place = _Place(module, calls, mark, tensor, reductions, fused, [site])
    place.share = None if shares is None else shares[mark]
    if not is_grad_enabled:
        place.refusal = WITHOUT_GRADIENT
        return place
    if not example.requires_grad:
        place.refusal = "the tensor is detached in place later"
        return place
    if is_distributed(example):
        place.refusal = "the gradient of a DTensor may be placed in another way than the tensor"
        return place
    if place.share is not None and place.share.kind == "unsummed":
        place.refusal = place.share.reason
        return place
    if not isinstance(example, FakeTensor):
        place.refusal = "inside a function transform"
        return place
    # A view that is overwritten, or that leaves the graph beside what it views, is another program.
    is_overwritten = bool(storages([tensor]) & overwritten)
    place.copies = is_overwritten or bool(storages([tensor]) & returned)
    if place.copies and (
        _has_other_names(module, tensor, mark, is_overwritten) or _is_expanded(example)
    ):
        place.refusal = "the tensor is overwritten or returned, and has other names"
    return place


def _has_other_names(module: GraphModule, tensor: Node, mark: Node, is_overwritten: bool) -> bool:
    """Whether something from before ``mark`` that shares the memory of ``tensor`` is used after.

    What is made of the tensor after the mark is made of the probe's result. To be measured is a use
    if the tensor is overwritten, which a copy would not show.
    """
    storage = storages([tensor])
    for node in module.graph.nodes:
        if node is mark:
            break
        if node is tensor or sites_of(node) or not storages([node]) & storage:
            continue
        if node.op == "placeholder" or any(
            mark < user and (is_overwritten or not is_mark(user)) and not sites_of(user)
            for user in node.users
        ):
            return True
    return False


def _is_expanded(example: torch.Tensor) -> bool:
    return any(isinstance(stride, int) and stride == 0 for stride in example.stride())


def _computes(node: Node) -> bool:
    """Whether something of the traced program happens here: not a mark, not a measurement."""
    return node.op not in ("placeholder", "get_attr") and not sites_of(node)


def _ordered(places: Sequence[_Place]) -> list[_Row]:
    """The rows of places, in the order in which they lie: those that are read together last."""
    rows = [(place, index) for place in places for index in range(len(place.reductions))]

    def together(row: _Row) -> str:
        place, index = row
        return columns_of(place.reductions[index]) if place.fused[index] == TOGETHER else ""

    return sorted(rows, key=together)


def _row_input(device: torch.device, rows: Sequence[_Row]) -> RowInput:
    slots, start = [], 0
    for place, index in rows:
        reduction = place.reductions[index]
        slots += [
            Slot.of(Measurement(FAMILY, site, reduction, place.share), start)
            for site in place.sites
        ]
        start += reduction.width
    return RowInput(device, start, PackedLayout(tuple(slots), 1))


def _add_input(module: GraphModule, row_input: RowInput, like: FakeTensor) -> Node:
    """The extra input, whose gradient will be the rows of all probes."""
    with like.fake_mode, torch.enable_grad():
        value = torch.zeros(
            row_input.length,
            dtype=packed_dtype(row_input.device),
            device=row_input.device,
            requires_grad=True,
        )
    return add_placeholder(module, f"tmm_gradient_rows_{row_input.device.type}", value)


def _part_nodes(
    module: GraphModule, row_input: Node, place: Node, rows: Sequence[_Row], *, scaled: bool
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


def _part(place: _Place, index: int, *, scaled: bool) -> Part:
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


def _fused(
    example: torch.Tensor, reduction: Reduction, request: GraphRequest
) -> tuple[Rows, FusedRow] | str:
    if not request.fuses:
        return "the backend fuses nothing"
    if reduction.function is not None:
        return "a function of the user"
    if reduction.is_histogram:
        return "a histogram"
    if any(not isinstance(size, int) for size in example.shape):
        return "its sizes change"  # the stand-ins for its partials are made before it is
    return fused_row(example, reduction.columns, example.numel(), request.lowering)


def _first(rows: torch.Tensor) -> torch.Tensor:
    """What gradients are multiplied with: each element of the extra input."""
    return rows.detach().narrow(0, 0, 1)


def _inside(calls: tuple[tuple[GraphModule, Node], ...], row: Node) -> Node:
    """``row`` as an input of the nested graph that these calls lead to."""
    for owner, call in calls:
        (body,) = (body for node, body in nested_calls(owner) if node is call)
        call.args = (*call.args, row)
        row = add_placeholder(body, row.name, value_of(row))
    return row


def _as_argument(fused: tuple[Rows, FusedRow] | str) -> Fused:
    """How a row comes about, as a probe takes it."""
    if isinstance(fused, str):
        return "together" if fused == TOGETHER else None
    rows, row = fused
    return row.arguments(rows)


def _insert(place: _Place, rows: list[Node], factor: Node | None) -> None:
    module, mark, tensor = place.module, place.mark, place.mark.args[0]
    assert isinstance(tensor, Node)
    example = value_of(tensor)
    functions = [
        None if reduction.function is None else trace_function(example, reduction)
        for reduction in place.reductions
    ]
    columns = [columns_of(reduction) for reduction in place.reductions]
    fused = [_as_argument(how) for how in place.fused]
    later = {user for user in tensor.users if mark < user}
    at = Rewriter(module.graph, mark)
    if any(functions):
        name = f"probe_{rows[0].name}"
        module.add_submodule(name, FunctionProbe(columns, fused, functions, copies=place.copies))
        given = (tensor, rows, factor)
        node = at.add("call_module", name, given, {}, example, stands_for=mark)
    else:
        all_given = (tensor, rows, columns, fused, place.copies, factor)
        node = at.add("call_function", probe, all_given, {}, example, stands_for=mark)
    for site in place.sites:
        at.credit(FAMILY, site)
    tensor.replace_all_uses_with(node, delete_user_cb=later.__contains__)
