"""Insert nodes behind a place of a graph, with what the tracer would tell of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import Argument, map_arg

from tmm.core.records import Site
from tmm.passes.graph.provenance import add_site
from tmm.passes.graph.values import copy_module_stack, set_value, value_of


class Rewriter:
    """Inserts nodes of ``graph`` behind the node ``place``, each after the ``last`` one.

    Each has a traced value afterwards. No gradient flows through values that are computed here.
    """

    def __init__(self, graph: Graph, place: Node) -> None:
        self.graph = graph
        self.last = place
        self._place, self._following = place, place.next

    def inserted(self) -> Iterator[Node]:
        """All that was inserted here, also by others, in the order of the graph."""
        node = self._place.next
        while node is not self._following:
            yield node
            node = node.next

    def credit(self, family: str, site: Site) -> None:
        """Remember that all that was inserted here measures ``site``."""
        for node in self.inserted():
            add_site(node, family, site)

    def call(
        self, target: Callable[..., Any] | str, *arguments: Argument, **keywords: Argument
    ) -> Node:
        """Insert a call of a function, or of a method by name; its value is computed."""
        op = "call_method" if isinstance(target, str) else "call_function"
        node = self.add(op, target, arguments, keywords, None)
        set_value(node, computed(node))
        return node

    def add(
        self,
        op: str,
        target: Callable[..., Any] | str,
        arguments: Sequence[Argument],
        keywords: Mapping[str, Argument],
        value: object,
        *,
        stands_for: Node | None = None,
    ) -> Node:
        """Insert a node with the traced ``value``; in the calls of modules of ``stands_for``."""
        with self.graph.inserting_after(self.last):
            self.last = self.graph.create_node(op, target, tuple(arguments), dict(keywords))
        set_value(self.last, value)
        if stands_for is not None:
            copy_module_stack(stands_for, self.last)
        return self.last

    def copy(self, node: Node, arguments: Callable[[Node], Argument], value: object) -> Node:
        """Insert a copy of a node of another graph, whose arguments ``arguments`` replaces."""
        with self.graph.inserting_after(self.last):
            self.last = self.graph.node_copy(node, arguments)
        self.last.meta = {}
        set_value(self.last, value)
        return self.last


def computed(node: Node) -> object:
    """What a call gives for the traced values of its arguments, without gradients."""
    arguments, keywords = map_arg((node.args, node.kwargs), value_of)
    with torch.no_grad():
        if isinstance(node.target, str):
            return getattr(arguments[0], node.target)(*arguments[1:], **keywords)
        return node.target(*arguments, **keywords)
