"""Insert a probe at each marked tensor, which measures its gradient in the backward pass."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from tmm.core.families import ACTIVATION_GRADIENT
from tmm.core.metrics import Reduction
from tmm.core.records import Measurement, PackedLayout, Share, Site, Slot
from tmm.core.torch_private import FakeTensor
from tmm.kernels.dense import packed_dtype
from tmm.kernels.ops import tap
from tmm.kernels.unreadable import why_unmeasurable
from tmm.passes.findings import GraphFindings, RowInput
from tmm.passes.graph.edits import add_placeholder, storages
from tmm.passes.graph.provenance import sites_of
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.sharding import is_distributed
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import is_mark, site_of
from tmm.passes.graph.values import local_example, value_of
from tmm.passes.metrics.gradient_probe import FunctionProbe, columns_of, probe
from tmm.passes.metrics.trace import trace_function
from tmm.passes.request import GraphRequest

FAMILY = ACTIVATION_GRADIENT.name

WITHOUT_GRADIENT = "the module gives back what it was given, inside of torch.no_grad"
"""Why a tensor that requires a gradient has no probe: it would hand on none."""

NOT_JOINED = (
    "each process is measured by itself, and the gradient of a DTensor may be a sum over processes"
)
"""Why the gradient of a ``DTensor`` has no rows where ranks are not joined."""

_PROBED = "tmm_probed"


@dataclass
class _Place:
    """A probe to be inserted: after which tap of which tensor, inside of which calls."""

    module: GraphModule
    calls: tuple[tuple[GraphModule, Node], ...]
    mark: Node
    tensor: Node
    reductions: tuple[Reduction, ...]
    sites: list[Site] = field(default_factory=list)
    copies: bool = False
    refusal: str = ""
    share: Share | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = value_of(self.tensor).device
        return device

    @property
    def width(self) -> int:
        return sum(reduction.width for reduction in self.reductions)


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
        row_input = _row_input(device, here)
        found.row_inputs += (row_input,)
        for place, row in zip(here, _row_nodes(module, row_input, here), strict=True):
            _insert(place, _inside(place.calls, row), scaled=request.scales_gradients)
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
    returned, overwritten = storages(module.graph.output_node().all_input_nodes), _written(module)
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
    place = _Place(module, calls, mark, tensor, reductions, [site])
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


def _written(module: GraphModule) -> set[int]:
    """The memory that the graph writes to."""
    return storages(
        node
        for node in module.graph.nodes
        if isinstance(example := local_example(value_of(node)), FakeTensor) and example._version
    )


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


def _row_input(device: torch.device, places: Sequence[_Place]) -> RowInput:
    slots, start = [], 0
    for place in places:
        for reduction in place.reductions:
            slots += [
                Slot.of(Measurement(FAMILY, site, reduction, place.share), start)
                for site in place.sites
            ]
            start += reduction.width
    return RowInput(device, start, PackedLayout(tuple(slots), 1))


def _row_nodes(
    module: GraphModule, row_input: RowInput, places: Sequence[_Place]
) -> Sequence[Node]:
    """The extra input, cut into the rows of the probes: one operation, and one in the backward."""
    example = local_example(value_of(places[0].tensor))
    with example.fake_mode, torch.enable_grad():
        value = torch.zeros(
            row_input.length,
            dtype=packed_dtype(row_input.device),
            device=row_input.device,
            requires_grad=True,
        )
    rows = add_placeholder(module, f"tmm_gradient_rows_{row_input.device.type}", value)
    widths = [place.width for place in places]
    at, parts = Rewriter(module.graph, rows), torch.split(value, widths)
    split = at.add("call_function", torch.split, (rows, widths), {}, parts)
    return [at.call(operator.getitem, split, index) for index in range(len(parts))]


def _inside(calls: tuple[tuple[GraphModule, Node], ...], row: Node) -> Node:
    """``row`` as an input of the nested graph that these calls lead to."""
    for owner, call in calls:
        (body,) = (body for node, body in nested_calls(owner) if node is call)
        call.args = (*call.args, row)
        row = add_placeholder(body, row.name, value_of(row))
    return row


def _insert(place: _Place, row: Node, *, scaled: bool) -> None:
    module, mark, tensor = place.module, place.mark, place.mark.args[0]
    assert isinstance(tensor, Node)
    example = value_of(tensor)
    part = local_example(example)
    functions = [
        None if reduction.function is None else trace_function(part, reduction)
        for reduction in place.reductions
    ]
    columns = [columns_of(reduction) for reduction in place.reductions]
    flags = {"copies": place.copies, "scaled": scaled}
    later = {user for user in tensor.users if mark < user}
    at = Rewriter(module.graph, mark)
    if any(functions):
        name = f"probe_{row.name}"
        module.add_submodule(name, FunctionProbe(columns, functions, **flags))
        node = at.add("call_module", name, (tensor, row), {}, example, stands_for=mark)
    else:
        given, chosen = (tensor, row, columns), {flag: True for flag, on in flags.items() if on}
        node = at.add("call_function", probe, given, chosen, example, stands_for=mark)
    for site in place.sites:
        at.credit(FAMILY, site)
    tensor.replace_all_uses_with(node, delete_user_cb=later.__contains__)
