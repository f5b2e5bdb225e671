"""Trace a user's metric function into a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from tmm.core.metrics import Reduction
from tmm.core.torch_private import FakeTensor, OpOverload
from tmm.kernels.own_results import ResultError, result_tensor
from tmm.passes.graph.rewriter import Rewriter, computed
from tmm.passes.graph.values import set_value, value_of


class MetricFunctionError(ValueError):
    """A user's metric function cannot be part of a compiled graph."""


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
        result = result_tensor(function(tensor), tensor)
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
    except ResultError as error:
        raise MetricFunctionError(f"the metric {name!r} cannot be measured: {error}") from error
    except Exception as error:
        raise MetricFunctionError(
            f"the metric {name!r} cannot be traced into the graph: {error}\n"
            "Write it with tensor operations only, without .item() or branches on values, or give"
            f" its rule trace=False to run {name!r} eagerly on the tensor."
        ) from error
    operations = [n for n in traced.graph.nodes if isinstance(n.target, OpOverload)]
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


@dataclass
class Traces:
    """Functions that were traced before: one of equal tensors has equal operations.

    A model of many equal blocks asks for the same function of the same kind of tensor again and
    again, and tracing takes a hundred times as long as copying what it gave.
    """

    known: dict[Hashable, TracedFunction] = field(default_factory=dict)

    def trace(
        self,
        function: Callable[..., torch.Tensor],
        examples: Sequence[torch.Tensor],
        reduction: Reduction,
    ) -> tuple[TracedFunction, bool]:
        """As ``trace``, of a function that is equal to those that compute the same.

        Tells as well whether it was known, so that its nodes hold the examples of others.
        """
        kinds = [_kind(example) for example in examples]
        if None in kinds:
            return trace(function, examples, reduction), False
        key = (function, reduction, *kinds)
        if key in self.known:
            return self.known[key], True
        traced = self.known[key] = trace(function, examples, reduction)
        return traced, False


def _kind(example: torch.Tensor) -> Hashable | None:
    """What operations can depend on, besides values; None where that cannot be compared."""
    if type(example) is not FakeTensor or example.layout is not torch.strided:
        return None
    shape, stride = tuple(example.shape), tuple(example.stride())
    if not all(isinstance(size, int) for size in (*shape, *stride)):
        return None  # another symbol, or none, may stand for the same size
    state = (example.requires_grad, example.is_conj(), example.is_neg())
    return (shape, stride, example.dtype, example.device, state)


def insert_traced(
    at: Rewriter, function: TracedFunction, values: Sequence[Node], *, was_known: bool = False
) -> Node:
    """Insert traced operations on ``values``; gives the node of their result.

    What the function does to its arguments in place, it does to copies. A function that
    ``was_known`` was traced with other examples: the nodes get ones of their own.
    """
    mode, graph = value_of(values[0]).fake_mode, function.graph.graph
    given = [at.call("clone", value) if function.mutates else value for value in values]
    copies: dict[Node, Node] = dict(zip(graph.find_nodes(op="placeholder"), given, strict=True))
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        copied = copies[node] = at.copy(node, copies.__getitem__, node.meta.get("val"))
        if was_known:
            with mode:
                set_value(copied, computed(copied))
    (result,) = graph.output_node().all_input_nodes
    return copies[result]
