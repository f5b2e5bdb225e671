"""What the tracer tells of the nodes of a graph: the one reader and writer of its metadata."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

if TYPE_CHECKING:
    from torch._dynamo.variables.builder import GraphArg

_VALUE, _ARGUMENT = "example_value", "grapharg"


def value_of(node: Node) -> Any:
    """The traced value of a node: fake tensors, symbols, numbers; None where nothing is known."""
    return node.meta.get(_VALUE)


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
