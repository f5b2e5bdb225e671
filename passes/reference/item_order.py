"""Where the items of a batch do not come one after the other, whatever sizes say."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node

from tmm.core.torch_private import tree_leaves
from tmm.passes.graph.provenance import sites_of
from tmm.passes.graph.subgraphs import nested_calls
from tmm.passes.graph.values import value_of
from tmm.passes.reference.prefix_branch import Samples, expression

_RESHAPES = (
    *("view", "reshape", "flatten", "unflatten", "ravel"),
    *(torch.reshape, torch.flatten, torch.unflatten, torch.ravel),
)


def scrambled(
    module: GraphModule, samples: Samples, given: frozenset[Node] = frozenset()
) -> frozenset[Node]:
    """The nodes, also of nested graphs, in whose tensors the first items need not come first.

    A reshape keeps items outermost if as many elements lie before them as did; any other operation
    if an item has as many elements in their dimension as before. ``given`` are known already.
    """
    found, bodies = set(given), dict(nested_calls(module))
    for node in module.graph.nodes:
        example = value_of(node)
        if sites_of(node) or not samples.has_items(example):
            continue
        if node in bodies:
            body = bodies[node]
            placeholders = body.graph.find_nodes(op="placeholder")
            pairs = zip(placeholders, node.args[1:], strict=False)
            inner = scrambled(body, samples, frozenset(p for p, a in pairs if a in found))
            found |= inner
            if not inner.isdisjoint(body.graph.output_node().all_input_nodes):
                found.add(node)
            continue
        sources = [s for s in node.all_input_nodes if samples.has_items(value_of(s))]
        if not found.isdisjoint(sources) or not _keeps_order(node, sources, samples):
            found.add(node)
    return frozenset(found)


def _keeps_order(node: Node, sources: list[Node], samples: Samples) -> bool:
    before = [place for s in sources for place in _places(value_of(s), samples)]
    after = _places(value_of(node), samples)
    if not before:
        return True  # made of sizes alone
    index = 0 if node.target in _RESHAPES else 1
    known = {place[index] for place in before}
    return all(place[index] in known for place in after)


def _places(value: Any, samples: Samples) -> list[tuple[Any, Any]]:
    """For each tensor with items: elements before them, and those of one in their dimension."""
    places = []
    for tensor in tree_leaves(value):
        if not isinstance(tensor, torch.Tensor) or not samples.has_items(tensor):
            continue
        dimension = samples.dimension(tensor)
        if dimension is not None:
            sizes = [expression(size) for size in tensor.shape]
            own = sympy.simplify(sizes[dimension] / samples.batch)
            places.append((sympy.Mul(*sizes[:dimension]), own))
    return places
