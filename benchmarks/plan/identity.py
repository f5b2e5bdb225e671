"""Names for the nodes of a graph that do not depend on what else stands in it.

A node is what it computes: its operation, and what its inputs are. Two programs that compute the
same value have nodes of one name for it, though one of them measures it as well and both number
their nodes otherwise. Views are one of what the first of them views, or that itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch.fx import GraphModule, Node

_NAME = "benchmark_identity"
_VIEWS = ("view", "reshape", "_unsafe_view", "alias", "detach")


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
    if node.op == "get_attr":
        return f"get_attr {node.target}"
    if _is_view(node):
        return _view(node)
    arguments = (*node.args, *sorted(node.kwargs.items()))
    parts = [str(node.target), *map(_text, arguments)]
    return _hash(*parts)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _text(argument: object) -> str:
    if isinstance(argument, Node):
        return identity(argument)
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_text, argument))}]"
    if isinstance(argument, Mapping):
        return _text([(key, argument[key]) for key in argument])
    return repr(argument)


def _is_view(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target.overloadpacket.__name__
    return node.target.namespace == "aten" and name in _VIEWS


def _view(node: Node) -> str:
    root = node
    while _is_view(root):
        (source, *_) = root.args
        assert isinstance(source, Node)
        root = source
    layouts = [
        (tuple(value.shape), value.stride())
        for value in (each.meta.get("val") for each in (node, root))
        if isinstance(value, torch.Tensor)
    ]
    if len(set(layouts)) == 1:
        return identity(root)
    return _hash("view", identity(root), str(layouts[0]))
