"""Traced graphs for the tests of passes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch._dynamo.testing import normalize_gm
from torch.fx import GraphModule

from tmm.core.metrics import Reduction, builtin_reductions
from tmm.instrumentation.outputs import mark_inputs, mark_outputs
from tmm.passes.findings import GraphFindings
from tmm.passes.request import GraphRequest


def trace(
    module: torch.nn.Module,
    *inputs: torch.Tensor,
    inputs_marked: bool = False,
    step: Callable[..., object] | None = None,
) -> GraphModule:
    """The graph that Dynamo hands to a backend, with every module's outputs marked.

    It is that of ``step``, a function of the module and the inputs, if there is one.
    """
    torch._dynamo.reset()
    graphs: list[GraphModule] = []

    def keep(graph: GraphModule, _: list[torch.Tensor]) -> Callable[..., object]:
        for node in graph.graph.find_nodes(op="placeholder"):
            node.meta["real"] = node.meta["grapharg"].example  # Dynamo clears it later
        graphs.append(graph)
        return graph.forward

    def call(traced: torch.nn.Module, *arguments: torch.Tensor) -> object:
        return traced(*arguments)

    handles = [child.register_forward_hook(mark_outputs) for child in module.modules()]
    if inputs_marked:
        handles += [
            child.register_forward_pre_hook(mark_inputs, with_kwargs=True)
            for child in module.modules()
        ]
    torch.compile(step or call, backend=keep, fullgraph=True)(module, *inputs)
    for handle in handles:
        handle.remove()
    (graph,) = graphs
    return graph


NOTHING = GraphRequest({}, lambda site, dtype: ())


def applied(
    apply: Callable[[GraphModule, GraphRequest, GraphFindings], None],
    graph: GraphModule,
    request: GraphRequest = NOTHING,
) -> GraphFindings:
    """What a pass finds in a graph, which it may change."""
    found = GraphFindings()
    apply(graph, request, found)
    return found


def measure(module: torch.nn.Module, *metrics: str, **functions: object) -> GraphRequest:
    """Measure these metrics of every module."""
    names = {id(child): name for name, child in module.named_modules()}
    own = tuple(
        Reduction((name,), ("count", "sum"), function)  # type: ignore[arg-type]
        for name, function in functions.items()
    )

    def select(_: str, dtype: torch.dtype) -> tuple[Reduction, ...]:
        return builtin_reductions(metrics, is_complex=dtype.is_complex) + own

    return GraphRequest(names, select)


def text(graph: GraphModule) -> str:
    """The code of a graph and its nested graphs, without what differs between machines."""
    graph.recompile()
    code = normalize_gm(graph.print_readable(print_output=False))
    lines = [re.sub(r"(;  .* = None)$", "", line) for line in code.splitlines()]
    return "\n".join(line for line in lines if line.strip() and "# " not in line) + "\n"


def check_golden(name: str, actual: str) -> None:
    """Compare with ``tests/golden/name.txt``; TMM_UPDATE_GOLDEN=1 writes it instead."""
    path = Path(__file__).parent / "golden" / f"{name}.txt"
    if os.environ.get("TMM_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(actual)
    assert path.read_text() == actual
