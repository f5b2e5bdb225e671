"""What the tracer tells of the nodes of a graph: the one reader and writer of its metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from torch.fx import Node

if TYPE_CHECKING:
    from tmm.core.dynamo_private import GraphArg

_VALUE, _ARGUMENT, _CALLS = "example_value", "grapharg", "nn_module_stack"
_ORIGIN = (_CALLS, "stack_trace", "source_fn_stack")


def value_of(node: Node) -> Any:
    """The traced value of a node: fake tensors, symbols, numbers; None where nothing is known."""
    return node.meta.get(_VALUE)


def local_example(example: Any) -> Any:
    """What this rank has of a traced ``DTensor``, or the values of a jagged tensor.

    Anything else comes as it is.
    """
    with torch.no_grad():
        if isinstance(example, DTensor):
            return example.to_local()
        if isinstance(example, torch.Tensor) and example.layout is torch.jagged:
            return example.values()
    return example


def has_value(node: Node) -> bool:
    """Whether the traced value of a node is known."""
    return _VALUE in node.meta


def set_value(node: Node, value: object) -> None:
    """Tell the traced value of a node."""
    node.meta[_VALUE] = value


def forget_value(node: Node) -> None:
    """Let the traced value of a node be unknown."""
    del node.meta[_VALUE]


def argument_of(node: Node) -> GraphArg | None:
    """What the program gives for an input of the graph; None for other nodes."""
    argument: GraphArg | None = node.meta.get(_ARGUMENT)
    return argument


def module_stack(node: Node) -> dict[str, tuple[str, type]]:
    """The calls of modules that a node was traced in, the outermost first.

    Path and type of the module by its ``id``, of a repeated call with "@n".
    """
    return node.meta.get(_CALLS) or {}


def module_of(call: str) -> int:
    """The ``id`` of the module of a call, which `module_stack` names."""
    return int(call.partition("@")[0])


def copy_module_stack(source: Node, target: Node) -> None:
    """Let ``target`` lie in the calls of modules that ``source`` was traced in."""
    if _CALLS in source.meta:
        target.meta[_CALLS] = source.meta[_CALLS]


def origin_of(node: Node) -> dict[str, Any]:
    """What the tracer tells of the lines and modules that a node comes from, as metadata."""
    return {key: node.meta[key] for key in _ORIGIN if key in node.meta}
