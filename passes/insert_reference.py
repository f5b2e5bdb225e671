"""Compare the marked tensors with those of a reference: its branch, and mixed-input copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from tmm.core.families import ACTIVATION_DIFFERENCE, RCC
from tmm.core.metrics import Reduction
from tmm.core.records import Measurement, Site
from tmm.kernels.ops import tap, tap_input, tap_shown, why_unmeasurable
from tmm.kernels.pairs import ROW_NORM, Normalization, normalized_norms, norms_without, reduce_pair
from tmm.passes.findings import GraphFindings, ReferenceEnds
from tmm.passes.graph.edits import add_placeholder, example_like, storages
from tmm.passes.graph.mutation import overwritten_by
from tmm.passes.graph.provenance import add_site, all_nodes, sites_of
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import call_of, is_mark, is_within, site_of
from tmm.passes.graph.values import argument_of, value_of
from tmm.passes.insert_reductions import MEASUREMENTS
from tmm.passes.metrics.trace import MetricFunctionError, Traces, insert_traced
from tmm.passes.reference.clone_nodes import ORIGIN, Copier
from tmm.passes.reference.dropout_masks import Masks
from tmm.passes.reference.item_order import scrambled
from tmm.passes.reference.prefix_branch import Samples
from tmm.passes.request import CheckedModule, ComparisonRequest, GraphRequest

_COMPARED = "tmm_compared"

PAIR = "tmm_pair"
"""Metadata of a row: the two tensors that it compares, equal where the reference is the model."""

BRANCH = "reference"

UPDATE_TERM = RCC.of("(W_t-W_0)x_t")
INPUT_TERM = RCC.of("W_0(x_t-x_0)")
INPUT = RCC.of("x_t")
INPUT_DIFFERENCE = RCC.of("(x_t-x_0)")

W_T_X_T, W_0_X_0 = ".weight/W_t x_t", ".weight/W_0 x_0"
X_T, X_CHANGE = ".weight/x_t", ".weight/x_t-x_0"
"""Paths of the norms of the operands of both terms of a weight."""


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
    marks = (mark for mark in all_nodes(module) if is_mark(mark))
    wanted = [mark for mark in marks if _is_wanted(mark, modules, asked)]
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
    wanted: Sequence[Node],
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
    marks = frozenset(mark for mark in wanted if _needs_branch(mark, modules, asked))
    branch = Copier(
        *(module, substitutes, marks, Masks(), BRANCH, Site("branch")),
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
    rows = _Rows(module, modules, asked, branch, parameters, set(wanted))
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


def _needs_branch(mark: Node, modules: Mapping[int, str], asked: ComparisonRequest) -> bool:
    site = site_of(mark, modules)
    assert site is not None
    (tensor,) = mark.all_input_nodes
    checked = _checked(site, asked)
    if checked is not None and not checked.only_update:
        return True
    dtype = value_of(tensor).dtype
    return mark.target is not tap_input and bool(asked.select(site, dtype))


def _is_wanted(mark: Node, modules: Mapping[int, str], asked: ComparisonRequest) -> bool:
    site = site_of(mark, modules)
    is_mark_of_site = mark.target in (tap, tap_input, tap_shown)
    if site is None or not is_mark_of_site or mark.meta.get(_COMPARED):
        return False
    (tensor,) = mark.all_input_nodes
    example = value_of(tensor)
    if why_unmeasurable(example):
        return False
    if mark.target is not tap_input and asked.select(site, example.dtype):
        return True
    return _checked(site, asked) is not None


def _checked(site: Site, asked: ComparisonRequest) -> CheckedModule | None:
    return None if site.is_shown else asked.check(site.module)


def _may_differ(node: Node, asked: ComparisonRequest) -> bool:
    example = value_of(node)
    argument = argument_of(node)
    # A number of Python, which enters a graph as a tensor, is the same on both sides.
    is_number = argument is not None and argument.pass_arg_as_tensor
    return isinstance(example, torch.Tensor) and not is_number and asked.parameter(node) is None


@dataclass
class _Rows:
    """Inserts the rows of the comparisons into a graph and the graphs nested in it."""

    module: GraphModule
    modules: Mapping[int, str]
    asked: ComparisonRequest
    branch: Copier
    parameters: Mapping[GraphModule, Mapping[Node, Node]]
    wanted: set[Node]
    differences: dict[tuple[Node, Reduction], Node] = field(default_factory=dict)
    traces: Traces = field(default_factory=Traces)

    def insert(self) -> Iterator[tuple[Site, str]]:
        yield from self._insert(self.module)

    def _insert(self, module: GraphModule) -> Iterator[tuple[Site, str]]:
        for mark in list(module.graph.nodes):
            if not is_mark(mark) and ORIGIN not in mark.meta and not sites_of(mark):
                self.differences.clear()  # what comes may overwrite the tensor
            if mark not in self.wanted:
                continue
            site = site_of(mark, self.modules)
            assert site is not None
            if mark in self.branch.refused:
                yield site, f"reference: {self.branch.refused[mark]}"
            elif mark.target is tap_input:
                self._input_rows(module, mark, site)
            else:
                yield from self._output_rows(module, mark, site)
        for call, body in nested_calls(module):
            if returns_body_outputs(call):
                yield from self._insert(body)

    def _input_rows(self, module: GraphModule, mark: Node, site: Site) -> None:
        checked = self.asked.check(site.module)
        assert checked is not None
        if checked.only_update:
            return
        place = _Place(module, mark, self.asked.samples, self.traces)
        site = Site(site.module)
        place.row(INPUT, site, ROW_NORM, norms_without, place.live)
        place.pair(INPUT_DIFFERENCE, site, ROW_NORM, place.live, place.of(self.branch))
        if checked.normalization is not None:
            norms = _NormalizedNorms(checked.normalization)
            values = place.live, place.of(self.branch)
            place.row(UPDATE_TERM, Site(site.module, X_T), ROW_NORM, norms, values[0])
            place.row(INPUT_TERM, Site(site.module, X_CHANGE), ROW_NORM, norms, *values)

    def _output_rows(
        self, module: GraphModule, mark: Node, site: Site
    ) -> Iterator[tuple[Site, str]]:
        place = _Place(module, mark, self.asked.samples, self.traces)
        dtype = value_of(mark.all_input_nodes[0]).dtype
        for reduction in self.asked.select(site, dtype):
            key = (place.tensor, reduction)
            if key in self.differences:
                row = self.differences[key]
                _also(row, ACTIVATION_DIFFERENCE.name, site, row.meta[MEASUREMENTS][0].reduction)
                continue
            self.differences[key] = place.pair(
                ACTIVATION_DIFFERENCE.name, site, reduction, place.live, place.of(self.branch)
            )
        checked = _checked(site, self.asked)
        if checked is None:
            return
        mixed = self._with_live_input(module, mark, site)
        if mark in mixed.refused:
            yield site, f"reference: {mixed.refused[mark]}"
            return
        own, weight = place.of(mixed), Site(site.module, f"{site.path}.weight")
        biases = self._biases(module, checked)
        row = place.pair(UPDATE_TERM, site, ROW_NORM, place.live, own)
        if checked.has_weight_rows and biases:
            place.pair(UPDATE_TERM, weight, ROW_NORM, place.live, own, biases)
        elif checked.has_weight_rows:
            _also(row, UPDATE_TERM, weight)
        if not checked.only_update:
            row = place.pair(INPUT_TERM, site, ROW_NORM, own, place.of(self.branch))
            if checked.has_weight_rows:
                _also(row, INPUT_TERM, weight)  # the bias is the same on both sides
        if checked.has_operand_rows:
            norms, reference = norms_without, place.of(self.branch)
            for term, path, values in (
                (UPDATE_TERM, W_T_X_T, (place.live, *biases[:1])),
                (INPUT_TERM, W_0_X_0, (reference, *biases[1:])),
            ):
                place.row(term, Site(site.module, site.path + path), ROW_NORM, norms, *values)

    def _with_live_input(self, module: GraphModule, mark: Node, site: Site) -> Copier:
        """W_0 x_t: the module's own nodes with the reference's parameters."""
        call = call_of(mark)
        assert call is not None
        parameters = self.parameters.get(module, {})
        mixed = Copier(
            *(module, parameters, frozenset([mark]), self.branch.masks, BRANCH, site),
            parameters={module: dict(parameters)},
            samples=self.asked.samples,
            scrambled=self.branch.scrambled,
        )
        mixed.copy(among=[node for node in module.graph.nodes if is_within(node, call)])
        return mixed

    def _biases(self, module: GraphModule, checked: CheckedModule) -> tuple[Node, ...]:
        for node, substitute in self.parameters.get(module, {}).items():
            outer = self.branch.outer.get(node, node)
            if checked.bias is not None and self.asked.parameter(outer) == checked.bias:
                return node, substitute
        return ()


class _Place:
    """Where rows go: directly after a mark, and after what was inserted there before."""

    def __init__(
        self, module: GraphModule, mark: Node, samples: Samples | None, traces: Traces
    ) -> None:
        self.module = module
        self.traces = traces
        self.mark = mark
        (self.tensor,) = mark.all_input_nodes
        at = Rewriter(module.graph, mark)
        self.live = at.call("detach", self.tensor)
        if samples is not None and samples.has_items(value_of(self.tensor)):
            self.live = samples.insert_narrow(at, self.live)
        self._last, self._shared = at.last, list(at.inserted())

    def of(self, copier: Copier) -> Node:
        """The counterpart that ``copier`` found of the marked tensor."""
        found = copier.found[self.mark]
        return self.live if found is self.tensor else found

    def pair(
        self,
        family: str,
        site: Site,
        reduction: Reduction,
        own: Node,
        reference: Node,
        offsets: tuple[Node, ...] = (),
    ) -> Node:
        """Insert the row of ``own`` and ``reference``, less ``offsets`` where given."""
        row = self.row(family, site, reduction, _Compare(reduction), own, reference, *offsets)
        if not offsets:
            row.meta[PAIR] = (own, reference)
        return row

    def row(
        self,
        family: str,
        site: Site,
        reduction: Reduction,
        function: Callable[..., torch.Tensor],
        *values: Node,
    ) -> Node:
        """Insert ``function`` of ``values``, a row; equal functions compute the same."""
        at = Rewriter(self.module.graph, self._last)
        examples = [value_of(value).detach() for value in values]
        try:
            traced, was_known = self.traces.trace(function, examples, reduction)
        except MetricFunctionError:
            if not reduction.falls_back:
                raise
            reduction = replace(reduction, trace=False)
            traced, was_known = self.traces.trace(_one_after_the_other, examples, reduction)
        row = insert_traced(at, traced, values, was_known=was_known)
        row.meta[MEASUREMENTS] = (Measurement(family, site, reduction),)
        at.credit(family, site)
        for node in self._shared:
            add_site(node, family, site)
        self._last = at.last
        return row


@dataclass(frozen=True)
class _Compare:
    """The row of two tensors, less two others where given."""

    reduction: Reduction

    def __call__(
        self, own: torch.Tensor, reference: torch.Tensor, *offsets: torch.Tensor
    ) -> torch.Tensor:
        if offsets:
            own, reference = own - offsets[0].detach(), reference - offsets[1]
        return reduce_pair(own, reference, self.reduction)


@dataclass(frozen=True)
class _NormalizedNorms:
    """The norms of rows as the weight of a normalization sees them."""

    normalization: Normalization

    def __call__(self, own: torch.Tensor, *reference: torch.Tensor) -> torch.Tensor:
        return normalized_norms(self.normalization, own, *reference)


def _one_after_the_other(own: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return torch.stack([own.detach(), reference.to(own.dtype)])


def _also(row: Node, family: str, site: Site, reduction: Reduction = ROW_NORM) -> None:
    """Let a row be that of a further site."""
    row.meta[MEASUREMENTS] += (Measurement(family, site, reduction),)
    add_site(row, family, site)
