"""What passes insert: where it goes, what is told of it, and whom it serves."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from tests.graphs import check_golden, text, trace
from tmm.core.metrics import Reduction
from tmm.core.records import Site
from tmm.kernels.ops import summarize
from tmm.passes.graph.copy import copy_graph
from tmm.passes.graph.provenance import sites_of
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.taps import call_of, is_mark
from tmm.passes.graph.values import value_of
from tmm.passes.metrics.trace import insert_traced, trace_function

X = torch.tensor([[1.0, -2.0], [3.0, 4.0]])


def traced() -> tuple[GraphModule, Node]:
    """A graph, and the first of its marks."""
    graph = copy_graph(trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), X))
    return graph, next(node for node in graph.graph.nodes if is_mark(node))


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2).abs()


def test_golden() -> None:
    graph, mark = traced()
    before = text(graph)
    (tensor,) = mark.all_input_nodes
    at = Rewriter(graph.graph, mark)
    detached = at.call("detach", tensor)
    at.call(summarize, detached, "count,sum")
    reduction = Reduction(("doubled",), ("count", "sum"), doubled)
    result = insert_traced(at, trace_function(value_of(detached), reduction), [detached])
    Rewriter(graph.graph, result).call(summarize, result, "count,sum")
    halves = at.add("call_function", torch.split, (detached, 1), {}, value_of(detached).split(1))
    at.call(operator.getitem, halves, 1)
    at.credit("activation", Site("0"))
    at.credit("activation", Site("0"))
    at.credit("activation", Site(""))
    graph.graph.lint()
    credits = [
        f"{node.name}: {', '.join(f'{family} of {site.module!r}' for family, site in sites)}\n"
        for node in graph.graph.nodes
        if (sites := sites_of(node))
    ]
    check_golden("rewriter", f"{before}\n# becomes\n\n{text(graph)}\n# for\n\n{''.join(credits)}")


def test_values_are_those_of_a_run_and_carry_no_gradient() -> None:
    graph, mark = traced()
    (tensor,) = mark.all_input_nodes
    assert value_of(tensor).requires_grad
    at = Rewriter(graph.graph, mark)
    nodes = [at.call("double", tensor), at.call(torch.cat, [tensor, tensor], dim=1)]
    for node, want in zip(nodes, (X.double(), torch.cat([X, X], dim=1)), strict=True):
        value = value_of(node)
        assert isinstance(value, FakeTensor)
        assert (value.shape, value.dtype) == (want.shape, want.dtype)
        assert not value.requires_grad


def test_nothing_inserted_serves_nobody() -> None:
    graph, mark = traced()
    before = text(graph)
    at = Rewriter(graph.graph, mark)
    at.credit("activation", Site("0"))
    assert at.last is mark
    assert list(at.inserted()) == []
    assert text(graph) == before
    assert not any(map(sites_of, graph.graph.nodes))


@pytest.mark.parametrize("in_its_place", [True, False])
def test_what_stands_for_a_node_lies_in_its_module(in_its_place: bool) -> None:
    graph, mark = traced()
    (tensor,) = mark.all_input_nodes
    at, place = Rewriter(graph.graph, mark), mark if in_its_place else None
    node = at.add("call_method", "clone", (tensor,), {}, value_of(tensor), stands_for=place)
    assert call_of(node) == (call_of(mark) if in_its_place else None)
