"""Trace a user's metric function into a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from tmm.metrics import Reduction


class MetricFunctionError(ValueError):
    """A user's metric function cannot be part of a compiled graph."""


def insert_call(
    graph: Graph, target: Callable[..., torch.Tensor] | str, value: Node, *arguments: str | bool
) -> Node:
    """Insert a call of a function, or of a method by name, with the example of its result."""
    example = value.meta["example_value"]
    if isinstance(target, str):
        node = graph.call_method(target, (value, *arguments))
        node.meta["example_value"] = getattr(example, target)(*arguments)
    else:
        node = graph.call_function(target, (value, *arguments))
        node.meta["example_value"] = target(example, *arguments)
    return node


@dataclass(frozen=True, eq=False)
class TracedFunction:
    """A user's function as a graph of operations; ``mutates`` tells that it changes its input."""

    graph: GraphModule
    mutates: bool


def trace_function(example: torch.Tensor, reduction: Reduction) -> TracedFunction:
    """The operations of ``reduction.function`` on tensors like ``example``, a fake one.

    Its result is flattened where all of its values are collected. Raises
    ``MetricFunctionError``, which names the metric and the reason, for a function that cannot be
    traced, draws random numbers (training would see others) or returns something else than one
    tensor.
    """
    function = reduction.function
    assert function is not None

    def traced_function(tensor: torch.Tensor) -> torch.Tensor:
        result = torch.as_tensor(function(tensor))
        return result.reshape(-1) if reduction.collects_values else result

    return trace(traced_function, (example,), reduction)


def trace(
    function: Callable[..., torch.Tensor], examples: Sequence[torch.Tensor], reduction: Reduction
) -> TracedFunction:
    """The operations of ``function``, which computes ``reduction``; errors as there."""
    name = reduction.metrics[0]
    fake_mode = examples[0].fake_mode  # type: ignore[attr-defined]
    try:
        # Tensors from outside are let in, so that they can be named below.
        with torch.no_grad(), fake_mode, patch.object(fake_mode, "allow_non_fake_inputs", True):
            traced = make_fx(function)(*examples)
    except Exception as error:
        raise MetricFunctionError(
            f"the metric {name!r} cannot be traced into the graph: {error}\n"
            "Write it with tensor operations only, without .item() or branches on values, or give"
            f" its rule trace=False to run {name!r} eagerly on the tensor."
        ) from error
    operations = [n for n in traced.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    if any(torch.Tag.nondeterministic_seeded in n.target.tags for n in operations):
        raise MetricFunctionError(
            f"the metric {name!r} draws random numbers, which would change those of the training;"
            " draw them beforehand, or give its rule trace=False, which leaves the others alone."
        )
    if traced.graph.find_nodes(op="get_attr"):
        raise MetricFunctionError(
            f"the metric {name!r} uses a tensor from outside of the function, which a compiled"
            " graph would keep as a constant; give its rule trace=False."
        )
    return TracedFunction(traced, any(n.target._schema.is_mutable for n in operations))


def insert_traced(
    graph: Graph, function: TracedFunction, values: Sequence[Node], position: Node
) -> Node:
    """Insert traced operations on ``values`` after ``position``; gives the node of their result.

    What the function does to its arguments in place, it does to copies.
    """
    copies: dict[Node, Node] = {}
    for placeholder, value in zip(
        function.graph.graph.find_nodes(op="placeholder"), values, strict=True
    ):
        copies[placeholder] = value
        if function.mutates:
            with graph.inserting_after(position):
                position = copies[placeholder] = insert_call(graph, "clone", value)
    for node in function.graph.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        with graph.inserting_after(position):
            position = copies[node] = graph.node_copy(node, copies.__getitem__)
        position.meta = {"example_value": node.meta.get("val")}
    (result,) = function.graph.graph.output_node().all_input_nodes
    return copies[result]
