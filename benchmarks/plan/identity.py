"""Names for the nodes of a graph that do not depend on what else stands in it.

A node is what it computes: its operation, and what its inputs are. Two programs that compute the
same value have nodes of one name for it, though one of them measures it as well and both number
their nodes otherwise. Views that change nothing are what they view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch.fx import GraphModule, Node

_NAME = "benchmark_identity"
_SAME = ("view", "reshape", "_unsafe_view", "alias", "detach")


def name_nodes(module: GraphModule, inputs: Mapping[str, str]) -> None:
    """Name all nodes; ``inputs`` are names of placeholders, of which others keep their own."""
    for node in module.graph.nodes:
        if node.op == "placeholder":
            node.meta[_NAME] = inputs.get(node.name, node.name)
        elif node.op != "output":
            node.meta[_NAME] = _structure(node)


def identity(node: Node) -> str:
    """The name of a node; of one that came later, from what it is made of."""
    if _NAME not in node.meta:
        node.meta[_NAME] = node.name if node.op == "placeholder" else _structure(node)
    name: str = node.meta[_NAME]
    return name


def identities(nodes: Iterable[Node]) -> frozenset[str]:
    """The names of the nodes that compute something."""
    return frozenset(identity(node) for node in nodes if node.op == "call_function")


def _structure(node: Node) -> str:
    if (viewed := _viewed(node)) is not None:
        return identity(viewed)
    if node.op == "get_attr":
        return f"get_attr {node.target}"
    arguments = (*node.args, *sorted(node.kwargs.items()))
    parts = [str(node.target), *map(_text, arguments)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _text(argument: object) -> str:
    if isinstance(argument, Node):
        return identity(argument)
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_text, argument))}]"
    if isinstance(argument, Mapping):
        return _text([(key, argument[key]) for key in argument])
    return repr(argument)


def _viewed(node: Node) -> Node | None:
    """What a view of the same sizes and strides views."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target.namespace != "aten" or node.target.overloadpacket.__name__ not in _SAME:
        return None
    (source, *_), value = node.args, node.meta.get("val")
    seen = source.meta.get("val") if isinstance(source, Node) else None
    if not (isinstance(value, torch.Tensor) and isinstance(seen, torch.Tensor)):
        return None
    is_same = value.shape == seen.shape and value.stride() == seen.stride()
    return source if is_same and isinstance(source, Node) else None
