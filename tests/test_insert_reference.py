"""The reference's branch and the mixed-input copies, in single graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from tests.graphs import NOTHING, applied, check_golden, text, trace
from tmm.core.metrics import Reduction, builtin_reductions
from tmm.passes.findings import GraphFindings, ReferenceEnds
from tmm.passes.graph.copy import copy_graph
from tmm.passes.graph.edits import storages
from tmm.passes.graph.slots import slots_of
from tmm.passes.insert_reference import insert_reference
from tmm.passes.lift_rows import lift_rows
from tmm.passes.metrics import trace as trace_function
from tmm.passes.pack_rows import pack_rows
from tmm.passes.reference.prefix_branch import Samples
from tmm.passes.remove_taps import remove_taps
from tmm.passes.request import CheckedModule, ComparisonRequest, GraphRequest

X = torch.tensor([[1.0, -2.0], [3.0, 4.0]])


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.drop(self.fc(x))
        y += 1
        return y


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.small = Small()
        self.head = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(checkpoint(self.small, x, use_reentrant=False))
        return y


def options_for(
    module: nn.Module,
    graph: GraphModule,
    *metrics: str,
    checked: str | None = None,
    is_part: bool = False,
) -> GraphRequest:
    def select(name: str, dtype: torch.dtype) -> tuple[Reduction, ...]:
        return builtin_reductions(metrics, is_complex=False)

    def check(name: str) -> CheckedModule | None:
        own = dict(module.named_modules()).get(name)
        if name != checked or own is None:
            return None
        bias = getattr(own, "bias", None)
        return CheckedModule(has_weight_rows=bias is not None, bias=id(bias))

    parameters = {id(parameter) for parameter in module.parameters()}
    placeholders = {
        node: id(node.meta["real"])
        for node in graph.graph.find_nodes(op="placeholder")
        if id(node.meta["real"]) in parameters
    }
    names = {id(child): name for name, child in module.named_modules()}
    asked = ComparisonRequest(select, check, placeholders.get, is_part)
    return replace(NOTHING, modules=names, comparison=asked)


def traced(module: nn.Module) -> GraphModule:
    return copy_graph(trace(module.train(), X, inputs_marked=True))


def test_golden() -> None:
    module = Small()
    graph = traced(module)
    before = text(graph)
    options = options_for(module, graph, "norm", checked="fc")
    found = applied(insert_reference, graph, options)
    assert found.reference == ReferenceEnds(parameters=(1, 2))
    assert found.unmeasured == []
    check_golden("insert_reference", before + "\n# becomes\n\n" + text(graph))


def test_golden_of_samples() -> None:
    module, x = Small(), X.repeat(2, 1)
    torch._dynamo.maybe_mark_dynamic(x, 0)
    graph = copy_graph(trace(module.train(), x, inputs_marked=True))
    before = text(graph)
    (size,) = (node.meta["example_value"] for node in graph.graph.nodes if node.name[0] == "s")
    samples = Samples(size.node.expr, 2)
    options = options_for(module, graph, "rms", checked="fc")
    assert options.comparison is not None
    options = replace(options, comparison=replace(options.comparison, samples=samples))
    found = applied(insert_reference, graph, options)
    assert found.reference == ReferenceEnds(parameters=(2, 3))
    assert found.unmeasured == []
    check_golden("insert_reference_samples", before + "\n# becomes\n\n" + text(graph))


def test_it_is_idempotent_and_leaves_what_is_not_asked_for_alone() -> None:
    module = Nested()
    graph = traced(module)
    untouched = text(graph)
    assert applied(insert_reference, graph, options_for(module, graph)) == GraphFindings()
    assert text(graph) == untouched
    options = options_for(module, graph, "norm", checked="small")
    applied(insert_reference, graph, options)
    once = text(graph)
    assert applied(insert_reference, graph, options) == GraphFindings()
    assert text(graph) == once


@pytest.mark.parametrize("module", [Small(), Nested()], ids=["flat", "nested"])
def test_the_branch_runs_on_the_reference_and_the_program_as_before(module: nn.Module) -> None:
    graph = traced(module)
    ends = applied(insert_reference, graph, options_for(module, graph, "norm")).reference
    assert not ends.inputs
    assert not ends.outputs
    applied(remove_taps, graph)
    applied(lift_rows, graph)
    layout = applied(pack_rows, graph).layout
    graph.recompile()
    placeholders = graph.graph.find_nodes(op="placeholder")
    own = [node.meta["real"] for node in placeholders if "real" in node.meta]
    same = [own[position].detach() for position in ends.parameters]
    torch.manual_seed(0)
    want = module(X)
    torch.manual_seed(0)
    output, packed = graph(*own, *same)
    assert torch.equal(output, want)
    assert all(packed[row.indices[1]] == 0 for row in layout.slots)
    torch.manual_seed(0)
    _, packed = graph(*own, *[tensor + 1 for tensor in same])
    assert all(packed[row.indices[1]] > 0 for row in layout.slots)


def test_a_part_takes_and_gives_counterparts() -> None:
    module = Small()
    graph = traced(module)
    ends = applied(insert_reference, graph, options_for(module, graph, is_part=True)).reference
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    (data,) = ends.inputs
    assert placeholders[data].meta["real"] is X
    assert ends.parameters == (1, 2)
    assert ends.outputs == (0,)
    assert not [node for node in graph.graph.nodes if slots_of(node)]


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x[0].add_(1)
        y: torch.Tensor = self.fc(x)
        return y


def test_a_part_gives_the_counterparts_of_what_it_overwrites() -> None:
    module, x = InPlace(), X.clone()
    graph = copy_graph(trace(module.train(), x, inputs_marked=True))
    ends = applied(insert_reference, graph, options_for(module, graph, is_part=True)).reference
    placeholders = list(graph.graph.find_nodes(op="placeholder"))
    assert [placeholders[position].meta["real"] is x for position in ends.overwritten] == [True]
    assert ends.added == 2
    applied(remove_taps, graph)
    graph.recompile()
    given, counterpart = torch.ones(2, 2), torch.zeros(2, 2)
    inputs = [given if node.meta["real"] is x else node.meta["real"] for node in placeholders[:3]]
    same = [inputs[position].detach() for position in ends.parameters]
    output, other, overwritten = graph(*inputs, *same, counterpart)
    after = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    assert torch.equal(given, torch.ones(2, 2) + after)
    assert torch.equal(counterpart, torch.zeros(2, 2))  # no counterpart that is kept changes
    assert torch.equal(overwritten, after)
    assert torch.equal(other, module.fc(after))
    assert torch.equal(output, module.fc(given))


class Blocks(nn.Module):
    def __init__(self, *widths: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for width in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if layer.in_features == 2 else layer(x.repeat(1, 2))[:, :2]
        return x


@pytest.mark.parametrize("widths", [(2, 2, 2), (2, 4, 2)])
def test_what_is_the_same_of_equal_tensors_is_traced_once(
    monkeypatch: pytest.MonkeyPatch, widths: tuple[int, ...]
) -> None:
    """The graph is the one that tracing each row anew gives, examples and their memory as well."""
    module = Blocks(*widths)
    made = []
    original = trace_function.trace
    monkeypatch.setattr(trace_function, "trace", lambda *a: made.append(a) or original(*a))
    graphs, counts = [], []
    for knows in (True, False):
        if not knows:
            monkeypatch.setattr(trace_function, "_kind", lambda example: None)
        graph = traced(module)
        made.clear()
        applied(
            insert_reference, graph, options_for(module, graph, "rms", "l2", checked="layers.1")
        )
        graphs.append(graph)
        counts.append(len(made))
    assert text(graphs[0]) == text(graphs[1])
    assert counts[0] < counts[1]
    for known, anew in zip(*(graph.graph.nodes for graph in graphs), strict=True):
        found, expected = known.meta.get("example_value"), anew.meta.get("example_value")
        if isinstance(expected, torch.Tensor):
            assert (found.shape, found.stride(), found.dtype) == (
                *(expected.shape, expected.stride(), expected.dtype),
            )
    shared = [
        [bool(storages([one]) & storages([other])) for one in nodes for other in nodes]
        for nodes in (graph.graph.nodes for graph in graphs)
    ]
    assert shared[0] == shared[1]
