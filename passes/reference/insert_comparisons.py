"""Compute the rows of comparisons in a graph, after the marks of the tensors that they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch.fx import GraphModule, Node

from tmm.core.families import ACTIVATION_DIFFERENCE
from tmm.core.metrics import Reduction
from tmm.core.records import Measurement, Site, Slot
from tmm.passes.graph.provenance import add_site, sites_of
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.sharding import Placements, is_distributed, why_unsummed
from tmm.passes.graph.slots import add_slots, slots_of
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import call_of, is_mark, is_within, site_of
from tmm.passes.graph.values import value_of
from tmm.passes.metrics.trace import MetricFunctionError, Traces, insert_traced
from tmm.passes.reference.clone_nodes import ORIGIN, Copier
from tmm.passes.reference.comparison_rows import Operand, Term
from tmm.passes.request import ComparisonRequest

PAIR = "tmm_pair"
"""Metadata of a row: the two tensors that it compares, equal where the reference is the model."""


@dataclass
class Comparisons:
    """Inserts the rows that are ``wanted`` at marks of a graph and the graphs nested in it.

    ``parameters`` are those of the reference, by graph; ``branch`` has copied what they need.
    """

    module: GraphModule
    modules: Mapping[int, str]
    asked: ComparisonRequest
    branch: Copier
    parameters: Mapping[GraphModule, Mapping[Node, Node]]
    wanted: Mapping[Node, tuple[Term, ...]]
    placements: Placements | None = None
    rows: dict[object, Node] = field(default_factory=dict)
    traces: Traces = field(default_factory=Traces)

    def insert(self) -> Iterator[tuple[Site, str]]:
        """Insert them; gives the sites that have none, with the reason."""
        yield from self._insert(self.module)

    def _insert(self, module: GraphModule) -> Iterator[tuple[Site, str]]:
        for mark in list(module.graph.nodes):
            if not is_mark(mark) and ORIGIN not in mark.meta and not sites_of(mark):
                self.rows.clear()  # what comes may overwrite the tensor
            if mark not in self.wanted:
                continue
            site = site_of(mark, self.modules)
            assert site is not None
            if mark in self.branch.refused:
                yield site, f"reference: {self.branch.refused[mark]}"
                continue
            for place, reason in self._insert_behind(module, mark, site):
                yield place, f"reference: {reason}"
        for call, body in nested_calls(module):
            if returns_body_outputs(call):
                yield from self._insert(body)

    def _insert_behind(
        self, module: GraphModule, mark: Node, site: Site
    ) -> Iterator[tuple[Site, str]]:
        """Insert the rows of a mark; gives what cannot be computed, with the reason."""
        place = _Place(module, mark, self.asked, self.branch, self.placements)
        if reason := place.why_unsummed():
            yield site, reason
            return
        for term in self.wanted[mark]:
            if "mixed" in term.operands and "mixed" not in place.operands:
                mixed = self._with_live_input(module, mark, site)
                if mark in mixed.refused:
                    yield site, mixed.refused[mark]
                    return
                biases = self._biases(module, site)
                place.operands |= {"mixed": place.of(mixed)}
                place.operands |= {name: place.local(bias) for name, bias in biases.items()}
            if reason := place.why_apart(given := term.given(place.operands)):
                yield term.site, reason
            elif term.reduction.function is None or not place.is_empty:
                self._execute(place, given)

    def _execute(self, place: _Place, term: Term) -> None:
        """Insert the row of a term; one row serves all that compute the same."""
        # A difference serves all marks of a tensor; the others are of one module's parameters.
        is_difference = term.family == ACTIVATION_DIFFERENCE.name
        key = (place.tensor if is_difference else place.mark, term.computation, term.operands)
        if (row := self.rows.get(key)) is None:
            self.rows[key] = place.row(term, self.traces)
        else:
            reduction = slots_of(row)[0].measurement.reduction
            add_slots(row, Slot.of(place.measurement(term, reduction)))
            add_site(row, term.family, term.site)

    def _with_live_input(self, module: GraphModule, mark: Node, site: Site) -> Copier:
        """W_0 x_t: the module's own nodes with the reference's parameters."""
        call = call_of(mark)
        assert call is not None
        parameters = self.parameters.get(module, {})
        mixed = Copier(
            *(module, parameters, frozenset([mark]), self.branch.masks, site),
            parameters={module: dict(parameters)},
            samples=self.asked.samples,
            scrambled=self.branch.scrambled,
        )
        mixed.copy(among=[node for node in module.graph.nodes if is_within(node, call)])
        return mixed

    def _biases(self, module: GraphModule, site: Site) -> dict[Operand, Node]:
        checked = self.asked.checked(site)
        for node, substitute in self.parameters.get(module, {}).items():
            parameter = self.asked.parameter(self.branch.outer.get(node, node))
            if checked is not None and checked.bias is not None and parameter == checked.bias:
                return {"bias": node, "reference bias": substitute}
        return {}


class _Place:
    """Where rows go: directly after a mark, and after what was inserted there before.

    ``operands`` are the nodes that terms can be computed from here.
    """

    def __init__(
        self,
        module: GraphModule,
        mark: Node,
        asked: ComparisonRequest,
        branch: Copier,
        placements: Placements | None,
    ) -> None:
        self.mark = mark
        (self.tensor,) = mark.all_input_nodes
        self._share = self._share_of_rows = None
        if placements is not None:
            self._share = placements.share(mark)
            self._share_of_rows = placements.share_of_rows(mark, self.tensor)
        at, samples = Rewriter(module.graph, mark), asked.samples
        live = at.call("detach", self.tensor)
        if samples is not None and samples.has_items(value_of(self.tensor)):
            live = samples.insert_narrow(at, live)
        live = _local(at, live)
        self.operands: dict[Operand, Node] = {"live": live}
        self._last, self._shared = at.last, list(at.inserted())
        if mark in branch.found:
            self.operands["reference"] = self.of(branch)

    def why_unsummed(self) -> str | None:
        """Why there can be no rows, where ranks have yet to sum the tensor."""
        if self._share is not None and self._share.kind == "unsummed":
            return self._share.reason
        return why_unsummed(value_of(self.tensor))

    @property
    def is_empty(self) -> bool:
        """Whether this rank has nothing of the tensor, of which functions need not know."""
        shape = value_of(self.operands["live"]).shape
        return any(isinstance(size, int) and size == 0 for size in shape)

    def why_apart(self, term: Term) -> str:
        """Why the parts that this rank has of the operands of a term do not fit together."""
        if self._share is None:
            return ""
        if term.normalization is not None and self._share_of_rows != self._share:
            return "the rows that it normalizes are split over ranks"
        live = value_of(self.operands["live"])
        for offset in term.offsets:
            if value_of(self.operands[offset]).shape[-1] != live.shape[-1]:
                return "ranks share its bias in another way than its output"
        return ""

    def of(self, copier: Copier) -> Node:
        """The counterpart that ``copier`` found of the marked tensor."""
        found = copier.found[self.mark]
        return self.operands["live"] if found is self.tensor else self.local(found)

    def local(self, tensor: Node) -> Node:
        """What this rank has of a tensor."""
        at = Rewriter(self.mark.graph, self._last)
        found = _local(at, tensor)
        self._last = at.last
        self._shared += at.inserted()
        return found

    def measurement(self, term: Term, reduction: Reduction) -> Measurement:
        """What the row of a term is of, on this rank."""
        share = self._share_of_rows if reduction.is_row_norm else self._share
        return replace(term.measurement, reduction=reduction, share=share)

    def row(self, term: Term, traces: Traces) -> Node:
        """Insert the row of a term."""
        at = Rewriter(self.mark.graph, self._last)
        values = [self.operands[operand] for operand in term.operands]
        examples, reduction = [value_of(value).detach() for value in values], term.reduction
        try:
            traced, was_known = traces.trace(term.computation, examples, reduction)
        except MetricFunctionError:
            if not reduction.falls_back:
                raise
            reduction = replace(reduction, trace=False)
            traced, was_known = traces.trace(_one_after_the_other, examples, reduction)
        row = insert_traced(at, traced, values, was_known=was_known)
        add_slots(row, Slot.of(self.measurement(term, reduction)))
        if term.right is not None and not term.offsets:
            row.meta[PAIR] = tuple(values)
        at.credit(term.family, term.site)
        for node in self._shared:
            add_site(node, term.family, term.site)
        self._last = at.last
        return row


def _local(at: Rewriter, tensor: Node) -> Node:
    """What this rank has of a tensor, and the values of a jagged one."""
    example = value_of(tensor)
    if is_distributed(example):
        return at.call("to_local", tensor)
    return at.call("values", tensor) if example.is_nested else tensor


def _one_after_the_other(own: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return torch.stack([own.detach(), reference.to(own.dtype)])
