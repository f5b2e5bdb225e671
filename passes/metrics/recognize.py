"""Recognize what a user's metric computes, where it is one of tmm's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch.fx import GraphModule, Node

from tmm.core.metrics import KnownMetric

aten = torch.ops.aten

Operation: TypeAlias = tuple[object, tuple[object, ...], tuple[tuple[str, object], ...]]
"""What is called on the result before: overload, further arguments, keywords."""

_LAYOUT = (aten.view.default, aten._unsafe_view.default, aten.clone.default)
_DETACH = (aten.detach.default, aten.alias.default)
_WIDE = (torch.float32, torch.float64)

_EACH: dict[tuple[Operation, ...], str] = {
    ((aten.abs.default, (), ()),): "absolute",
    ((aten.pow.Tensor_Scalar, (2,), ()),): "square",
    ((aten.mul.Tensor, ("itself",), ()),): "square",
    ((aten.eq.Scalar, (0,), ()),): "zero",
    (): "itself",
}
_WHOLE: dict[tuple[str, tuple[Operation, ...]], str] = {
    **{
        (each, ((aten.mean.default, (), ()),)): name
        for each, name in (
            *(("itself", "mean"), ("absolute", "mean_abs")),
            *(("square", "mean_square"), ("zero", "zero_fraction")),
        )
    },
    ("square", ((aten.mean.default, (), ()), (aten.sqrt.default, (), ()))): "rms",
    ("itself", ((aten.sum.default, (), ()),)): "sum",
    ("itself", ((aten.sum.default, (), ()), (aten.div.Tensor, ("count",), ()))): "mean",
    ("zero", ((aten.sum.default, (), ()), (aten.div.Tensor, ("count",), ()))): "zero_fraction",
    ("itself", ((aten.linalg_vector_norm.default, (), ()),)): "norm",
    ("itself", ((aten.linalg_vector_norm.default, (2,), ()),)): "norm",
    (
        "itself",
        ((aten.linalg_vector_norm.default, (), ()), (aten.div.Tensor, ("root",), ())),
    ): "rms",
    ("itself", ((aten.std.correction, (), ()),)): "std",
    ("itself", ((aten.var.correction, (), ()),)): "variance",
    **{
        (each, ((operation, (), ()),)): name
        for each, operation, name in (
            *(("itself", aten.max.default, "max"), ("itself", aten.amax.default, "max")),
            *(("itself", aten.min.default, "min"), ("itself", aten.amin.default, "min")),
            *(("absolute", aten.max.default, "absmax"), ("absolute", aten.amax.default, "absmax")),
        )
    },
}


def recognize(traced: GraphModule) -> KnownMetric | None:
    """The metric of tmm that a traced function of one real tensor computes; None if it is none.

    A metric of rows, such as the mean over the last dimension, is one of all elements where its
    values are summed up or averaged.
    """
    (placeholder,) = traced.graph.find_nodes(op="placeholder")
    example = placeholder.meta["val"]
    if not example.is_floating_point():
        return None
    chain = _chain(traced, placeholder)
    if chain is None:
        return None
    count = _product(example.shape)
    if count == 0:
        return None
    operations = [_named(operation, count) for operation in chain if not _is_cast(operation)]
    if operations and operations[-1][0] is aten.mean.dim:
        return _mean_of_rows(operations, example)
    operations = [operation for operation in operations if operation[0] not in _LAYOUT]
    for length in (1, 0):
        each = _EACH.get(tuple(operations[:length]))
        name = _WHOLE.get((each, tuple(operations[length:]))) if each else None
        if name is not None:
            return KnownMetric(name)
    return None


def _chain(traced: GraphModule, placeholder: Node) -> list[Operation] | None:
    """The operations that lead to the result, each of the one before only."""
    (result,) = traced.graph.output_node().all_input_nodes
    operations: list[Operation] = []
    while result is not placeholder:
        if result.op != "call_function" or len(result.all_input_nodes) != 1:
            return None
        before = result.all_input_nodes[0]
        if not result.args or result.args[0] is not before:
            return None
        further = tuple("itself" if value is before else value for value in result.args[1:])
        constants = tuple(list(v) if isinstance(v, (list, tuple)) else v for v in further)
        keywords = tuple(sorted(result.kwargs.items()))
        if result.target not in _DETACH:
            operations.insert(0, (result.target, _hashable(constants), keywords))
        result = before
    return operations


def _hashable(values: tuple[object, ...]) -> tuple[object, ...]:
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def _is_cast(operation: Operation) -> bool:
    target, further, keywords = operation
    wide = dict(keywords).get("dtype") in _WIDE
    return target is aten._to_copy.default and not further and wide and len(keywords) == 1


def _product(sizes: Sequence[int]) -> int | None:
    """The product of sizes; None if one of them is open."""
    return math.prod(sizes) if all(isinstance(size, int) for size in sizes) else None


def _named(operation: Operation, count: int | None) -> Operation:
    """The operation with the number of elements, or its root, by name."""
    target, further, keywords = operation
    if count is not None and target is aten.div.Tensor and not keywords and len(further) == 1:
        if further[0] == count:
            return target, ("count",), ()
        if isinstance(further[0], float) and math.isclose(further[0], math.sqrt(count)):
            return target, ("root",), ()
    return operation


def _mean_of_rows(operations: list[Operation], example: torch.Tensor) -> KnownMetric | None:
    *before, (_, further, keywords) = operations
    each = _EACH.get(tuple(before))
    name = _WHOLE.get((each, ((aten.mean.default, (), ()),))) if each else None
    dimensions = further[0] if further else None
    if name is None or keywords or not isinstance(dimensions, tuple) or not dimensions:
        return None
    if not example.dim():
        return None  # torch allows dimension -1 of a single number
    length = _product([example.shape[dimension] for dimension in dimensions])
    return None if length is None else KnownMetric(name, row_length=length)
