"""Insert a probe at each marked tensor, which measures its gradient in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.fx import GraphModule, Node

from tmm.core.metrics import Reduction
from tmm.core.records import Share
from tmm.core.torch_private import FakeTensor
from tmm.kernels.fused.choose_lowering import fused_row
from tmm.kernels.fused.row_partials import HALF, FusedRow, Rows
from tmm.kernels.ops import tap
from tmm.kernels.unreadable import why_unmeasurable
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.edits import add_placeholder, storages, written
from tmm.passes.graph.provenance import sites_of
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.sharding import is_distributed
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import is_mark, site_of
from tmm.passes.graph.values import local_example, value_of
from tmm.passes.metrics.gradient_probe import FunctionProbe, columns_of, probe
from tmm.passes.metrics.gradient_rows import (
    FAMILY,
    Place,
    add_row_input,
    as_argument,
    ordered_rows,
    part_nodes,
    row_input_of,
)
from tmm.passes.metrics.trace import trace_function
from tmm.passes.request import GraphRequest

WITHOUT_GRADIENT = "the module gives back what it was given, inside of torch.no_grad"
"""Why a tensor that requires a gradient has no probe: it would hand on none."""

IMAGE_IN_HALF = (
    "an image in half precision, beside which Inductor sums other gradients wrongly on a CPU;"
    " measure it with backend='aot_eager', or in float32"
)
"""Why such gradients have no rows: to measure them would change the training."""

NOT_JOINED = (
    "each process is measured by itself, and the gradient of a DTensor may be a sum over processes"
)
"""Why the gradient of a ``DTensor`` has no rows where ranks are not joined."""

_PROBED = "tmm_probed"


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
        rows = ordered_rows(here)
        row_input = row_input_of(device, rows)
        found.row_inputs += (row_input,)
        given = add_row_input(module, row_input, local_example(value_of(here[0].tensor)))
        factors: dict[tuple[tuple[GraphModule, Node], ...], Node] = {}
        factor = None
        if request.scales_gradients:
            factor = Rewriter(module.graph, given).call(_first, given)
        parts = part_nodes(module, given, factor or given, rows, scaled=factor is not None)
        nodes = dict(zip(rows, parts, strict=True))
        for place in here:
            own = [_inside(place.calls, nodes[place, i]) for i in range(len(place.reductions))]
            if factor is not None and place.calls not in factors:
                factors[place.calls] = _inside(place.calls, factor)
            _insert(place, own, factors.get(place.calls))
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
) -> Iterator[Place]:
    bodies: dict[Node, list[GraphModule]] = {}
    for call, body in nested_calls(module):
        bodies.setdefault(call, []).append(body)
    returned, overwritten = storages(module.graph.output_node().all_input_nodes), written(module)
    recent: dict[Node, Place] = {}
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
) -> Place | None:
    tensor = mark.args[0]
    assert isinstance(tensor, Node)
    example = value_of(tensor)
    site = site_of(mark, request.modules) if mark.target is tap else None
    requires_grad, is_grad_enabled = mark.args[2:] or (example.requires_grad, True)
    if site is None or not requires_grad or why_unmeasurable(example):
        return None
    if mark.meta.get(_PROBED):
        return None
    assert request.select_gradient is not None
    reductions = request.select_gradient(site, example.dtype)
    if not reductions:
        return None
    mark.meta[_PROBED] = True
    fused = tuple(_fused(example, reduction, request) for reduction in reductions)
    place = Place(module, calls, mark, tensor, reductions, fused, [site])
    place.share = None if shares is None else shares[mark]
    if not is_grad_enabled:
        place.refusal = WITHOUT_GRADIENT
        return place
    if not example.requires_grad:
        place.refusal = "the tensor is detached in place later"
        return place
    if is_distributed(example) and place.share is None:
        place.refusal = NOT_JOINED
        return place
    if place.share is not None and place.share.kind == "unsummed":
        place.refusal = place.share.reason
        return place
    if request.writes_in_place and _is_image_in_half(example):
        place.refusal = IMAGE_IN_HALF
        return place
    if not isinstance(local_example(example), FakeTensor):
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


def _is_image_in_half(example: torch.Tensor) -> bool:
    """Whether Inductor would compute what else needs the gradient wrongly.

    Where it writes an image in half precision contiguously, or sums its rows, in the same loops as
    sums of one with channels last, these sums are anything (torch 2.13). Parameters of a
    batch norm got such gradients.
    """
    return example.device.type == "cpu" and example.dtype in HALF and example.dim() >= 4


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
    strides = local_example(example).stride()
    return any(isinstance(stride, int) and stride == 0 for stride in strides)


def _computes(node: Node) -> bool:
    """Whether something of the traced program happens here: not a mark, not a measurement."""
    return node.op not in ("placeholder", "get_attr") and not sites_of(node)


def _fused(
    example: torch.Tensor, reduction: Reduction, request: GraphRequest
) -> tuple[Rows, FusedRow] | str:
    if not request.fuses:
        return "the backend fuses nothing"
    if is_distributed(example):
        return "ranks share it"
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


def _insert(place: Place, rows: list[Node], factor: Node | None) -> None:
    module, mark, tensor = place.module, place.mark, place.mark.args[0]
    assert isinstance(tensor, Node)
    example = value_of(tensor)
    part = local_example(example)
    functions = [
        None if reduction.function is None else trace_function(part, reduction)
        for reduction in place.reductions
    ]
    columns = [columns_of(reduction) for reduction in place.reductions]
    fused = [as_argument(how) for how in place.fused]
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
