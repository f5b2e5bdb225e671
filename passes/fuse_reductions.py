"""Let the compiler fuse reductions into other kernels, or one operator reduce several tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from tmm.core.metrics import COLUMN_SEPARATOR
from tmm.kernels.fused.choose_lowering import TOGETHER, fused_row, in_groups
from tmm.kernels.fused.row_partials import partials_of
from tmm.kernels.ops import summarize
from tmm.kernels.summarize.many import summarize_many
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.attended import is_only_attended
from tmm.passes.graph.between_products import is_between_products
from tmm.passes.graph.edits import storages, written
from tmm.passes.graph.fused_rows import set_fused
from tmm.passes.graph.mutation import overwritten_by
from tmm.passes.graph.provenance import add_site, copy_sites, sites_of
from tmm.passes.graph.readings import hinted_elements
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.slots import add_slots, take_slots
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.values import value_of
from tmm.passes.request import GraphRequest

_OVERWRITTEN = "overwritten later"
_ATTENDED = "only an attention reads it: one operator reads several of them"


def fuse_reductions(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Make partial sums, which the compiler fuses, of each operator where that costs less.

    Afterwards such a node holds partials of a tensor instead of its row; ``pack_rows`` merges all
    of them. Small tensors of a CPU are reduced by one operator, several at a time, which comes
    after the last of them; so are products of a GPU that nothing but attentions read. Other
    operators stay. Finds how each site is measured.
    """
    _fuse(module, request, found, is_nested=False)


def _fuse(
    module: GraphModule, request: GraphRequest, found: GraphFindings, *, is_nested: bool
) -> None:
    writes = _writes(module)
    together: list[Node] = []
    attended = set() if is_nested else _attended(module)
    for index, node in enumerate(list(module.graph.nodes)):
        if node.target is not summarize or node.users:
            continue
        tensor, columns = node.args
        assert isinstance(tensor, Node)
        example = value_of(tensor)
        names = str(columns).split(COLUMN_SEPARATOR)
        elements = hinted_elements(example)
        is_free = example.device.type != "cpu" and is_between_products(tensor)
        fused = fused_row(example, names, elements, request.lowering, is_free=is_free)
        is_overwritten = any(writes.get(s, -1) > index for s in storages([tensor]))
        if node in attended and not isinstance(fused, str) and not is_overwritten:
            fused = _ATTENDED
        if fused == TOGETHER and is_overwritten:
            fused = _OVERWRITTEN
        if fused in (TOGETHER, _ATTENDED):
            together.append(node)
        why = fused if isinstance(fused, str) else ""
        found.lowerings += [(*site, why) for site in sites_of(node)]
        if not isinstance(fused, str):
            rows, row = fused
            partials = Rewriter(node.graph, node).call(partials_of, tensor, *row.arguments(rows))
            set_fused(partials, row)
            add_slots(partials, *take_slots(node))
            copy_sites(node, partials)
            node.graph.erase_node(node)
    for group in _groups(together):
        _join(group)
    for call, body in nested_calls(module):
        if returns_body_outputs(call):
            _fuse(body, request, found, is_nested=True)


def _attended(module: GraphModule) -> set[Node]:
    """The operators of a GPU that read what only attentions read, where there are several.

    In a nested graph, such as one that is computed once more, tensors are not kept.
    """
    found = {
        node
        for node in module.graph.nodes
        if node.target is summarize
        and _tensor(node).device.type == "cuda"
        and is_only_attended(node.args[0])
    }
    return found if len(found) > 1 else set()


def _writes(module: GraphModule) -> dict[int, int]:
    """The last node that writes to each memory, by its number; one behind all if none tells."""
    last: dict[int, int] = {}
    for index, node in enumerate(module.graph.nodes):
        if (tensor := overwritten_by(node)) is not None:
            last |= dict.fromkeys(storages([tensor]), index)
    return dict.fromkeys(written(module), len(module.graph.nodes)) | last


def _groups(nodes: list[Node]) -> Iterator[list[Node]]:
    """Operators that may be one, each group in the order of the graph."""
    alike: dict[tuple[torch.device, object], list[Node]] = {}
    for node in nodes:
        alike.setdefault((_tensor(node).device, node.args[1]), []).append(node)
    for (device, _), some in alike.items():
        if device.type == "cpu":
            yield from in_groups(some, lambda node: hinted_elements(_tensor(node)))
        else:
            yield some


def _tensor(node: Node) -> torch.Tensor:
    """The traced value that an operator reduces."""
    tensor = node.args[0]
    assert isinstance(tensor, Node)
    example: torch.Tensor = value_of(tensor)
    return example


def _join(nodes: list[Node]) -> None:
    """Replace operators by one, after the last of them."""
    if len(nodes) < 2:
        return
    graph, columns = nodes[0].graph, nodes[0].args[1]
    tensors = [node.args[0] for node in nodes]
    joined = Rewriter(graph, nodes[-1]).call(summarize_many, tensors, columns)
    width = str(columns).count(COLUMN_SEPARATOR) + 1
    for index, node in enumerate(nodes):
        add_slots(joined, *(slot.at(slot.output, index * width) for slot in take_slots(node)))
        for family, site in sites_of(node):
            add_site(joined, family, site)
        graph.erase_node(node)
