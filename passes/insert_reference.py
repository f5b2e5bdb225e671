"""Compare the marked tensors with those of a reference: its branch, and mixed-input copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tmm.core.records import Site
from tmm.core.torch_private import stays_in_memory
from tmm.kernels.ops import tap, tap_input, tap_shown
from tmm.kernels.unreadable import why_unmeasurable
from tmm.passes.findings import GraphFindings, ReferenceEnds
from tmm.passes.graph.edits import add_placeholder, example_like, storages
from tmm.passes.graph.mutation import overwritten_by
from tmm.passes.graph.provenance import all_nodes
from tmm.passes.graph.taps import is_mark, site_of
from tmm.passes.graph.values import argument_of, value_of
from tmm.passes.reference.clone_nodes import Copier
from tmm.passes.reference.comparison_rows import Term, comparison_rows, input_rows
from tmm.passes.reference.dropout_masks import Masks
from tmm.passes.reference.insert_comparisons import Comparisons
from tmm.passes.reference.item_order import scrambled
from tmm.passes.request import ComparisonRequest, GraphRequest

_COMPARED = "tmm_compared"


def insert_reference(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """After each mark that is to be compared, insert the rows of the comparison.

    Afterwards the graph computes again, with the parameters of the reference and without
    gradients, what is needed for that and no more: from the inputs of the graph (the branch), and
    from the live inputs of each checked module. Masks of dropouts are shared with the live
    program, whose results stay bit for bit the same. Finds the extra inputs, which come last,
    with the extra outputs, and the sites that cannot be compared, with the reason.
    """
    asked, modules = request.comparison, request.modules
    assert asked is not None
    marks = (m for m in all_nodes(module) if is_mark(m) and _COMPARED not in m.meta)
    wanted = {mark: terms for mark in marks if (terms := _terms(mark, modules, asked))}
    for mark in wanted:
        mark.meta[_COMPARED] = True
    if asked.refusal:
        sites = (site_of(mark, modules) for mark in wanted)
        found.unmeasured += ((site, f"reference: {asked.refusal}") for site in sites if site)
    elif wanted or asked.is_part:
        found.reference = _compare(module, modules, asked, wanted, found)


def _compare(
    module: GraphModule,
    modules: Mapping[int, str],
    asked: ComparisonRequest,
    wanted: Mapping[Node, tuple[Term, ...]],
    found: GraphFindings,
) -> ReferenceEnds:
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    compared = [node for node in placeholders if asked.parameter(node) is not None]
    others = [node for node in placeholders if asked.is_part and _may_differ(node, asked)]
    substitutes = {
        node: add_placeholder(module, f"{node.name}_reference", example_like(value_of(node)))
        for node in (*compared, *others)
    }
    parameters = {module: {node: substitutes[node] for node in compared}}
    marks = {
        mark for mark, terms in wanted.items() if any("reference" in t.operands for t in terms)
    }
    branch = Copier(
        *(module, substitutes, marks, Masks(), Site("branch")),
        parameters=parameters,
        samples=asked.samples,
        scrambled=frozenset() if asked.samples is None else scrambled(module, asked.samples),
    )
    tensors = _returned_tensors(module)
    returned = tensors if asked.is_part else {}
    written = {}
    if asked.is_part:
        memory = storages(branch.overwritten())
        written = {i: node for i, node in enumerate(placeholders) if storages([node]) & memory}
        written = {i: node for i, node in written.items() if node in substitutes}
    branch.copy([*returned.values(), *written.values()])
    rows = Comparisons(module, modules, asked, branch, parameters, wanted, found.placements)
    found.unmeasured += rows.insert()
    outputs = tuple(
        position
        for position, node in returned.items()
        if node not in branch.refused and branch.copies[node] is not node
    )
    overwritten = tuple(i for i, node in written.items() if node not in branch.refused)
    further = [branch.copies[returned[position]] for position in outputs]
    further += [branch.copies[written[position]] for position in overwritten]
    if further:
        output = module.graph.output_node()
        (live,) = output.args
        assert isinstance(live, (tuple, list))
        output.args = ((*live, *further),)
    used = {node: substitute for node, substitute in substitutes.items() if substitute.users}
    for node in substitutes.keys() - used.keys():
        module.graph.erase_node(substitutes[node])
    for node in compared:
        # What a graph overwrites has another counterpart behind it, in the same forward pass.
        if node in used and node not in written.values() and asked.stays(node):
            stays_in_memory(used[node])
    return ReferenceEnds(
        tuple(i for i, node in enumerate(placeholders) if node in used and node in compared),
        tuple(i for i, node in enumerate(placeholders) if node in used and node in others),
        outputs,
        overwritten,
        is_part=asked.is_part,
        lost_outputs=_lost(returned, branch),
        lost_inputs=_lost(written, branch),
        end=_values_for_python(module, branch) if asked.is_part else "",
        independent=tuple(i for i, node in tensors.items() if node not in branch.dependent),
        constant=tuple(_constants(module, tensors)),
    )


def _constants(module: GraphModule, returned: Mapping[int, Node]) -> Iterator[int]:
    """The positions of returned tensors that no tensor among the inputs takes part in."""
    depends: set[Node] = set()
    for node in module.graph.nodes:
        is_input = node.op == "placeholder" and isinstance(value_of(node), torch.Tensor)
        if is_input or not depends.isdisjoint(node.all_input_nodes):
            depends.add(node)
            if (target := overwritten_by(node)) is not None:
                depends.add(target)
    for position, node in returned.items():
        if node not in depends and not any(storages([node]) & storages([d]) for d in depends):
            yield position


def _lost(nodes: Mapping[int, Node], branch: Copier) -> tuple[tuple[int, str], ...]:
    return tuple((i, branch.refused[node]) for i, node in nodes.items() if node in branch.refused)


def _values_for_python(module: GraphModule, branch: Copier) -> str:
    """Why the program may go on in another way for the reference; empty where it does not."""
    for node in module.graph.output_node().all_input_nodes:
        example = value_of(node)
        if node in branch.dependent and free_unbacked_symbols(example):
            kind = "the shape of a tensor" if isinstance(example, torch.Tensor) else "a value"
            return f"the program got {kind} that depends on parameters out of a graph ({node.name})"
    return ""


def _returned_tensors(module: GraphModule) -> dict[int, Node]:
    (returned,) = module.graph.output_node().args
    assert isinstance(returned, (tuple, list))
    return {
        position: node
        for position, node in enumerate(returned)
        if isinstance(node, Node) and isinstance(value_of(node), torch.Tensor)
    }


def _terms(mark: Node, modules: Mapping[int, str], asked: ComparisonRequest) -> tuple[Term, ...]:
    """The rows that are wanted at a mark."""
    site = site_of(mark, modules)
    if site is None or mark.target not in (tap, tap_input, tap_shown):
        return ()
    (tensor,) = mark.all_input_nodes
    if why_unmeasurable(example := value_of(tensor)):
        return ()
    checked = asked.checked(site)
    if mark.target is tap_input:
        return () if checked is None else input_rows(site.module, checked)
    return comparison_rows(site, asked.select(site, example.dtype), checked)


def _may_differ(node: Node, asked: ComparisonRequest) -> bool:
    example = value_of(node)
    argument = argument_of(node)
    # A number of Python, which enters a graph as a tensor, is the same on both sides.
    is_number = argument is not None and argument.pass_arg_as_tensor
    return isinstance(example, torch.Tensor) and not is_number and asked.parameter(node) is None
