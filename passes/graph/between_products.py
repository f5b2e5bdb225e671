"""Which tensors lie between products, where no kernel of the program sums rows."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.fx import Node

from tmm.passes.graph.known_functions import is_product, kind_of
from tmm.passes.graph.provenance import sites_of
from tmm.passes.graph.values import value_of
from tmm.passes.metrics.gradient_probe import probe

_FAR = 32  # tensors: what lies between two products is a few


def is_between_products(tensor: Node) -> bool:
    """Whether a tensor, and what is made of it element by element, comes from products into others.

    Such is the inside of a multilayer perceptron. Kernels that compute it take its elements in any
    order, where a norm or a sum of the program takes them row by row. ``tensor`` may be what it is
    measured by: detached, or behind a probe. Not known of sizes that may change: to compare them
    would make them constants.
    """
    elements = _elements(tensor)
    if elements is None:
        return False
    known, pending = {tensor}, [tensor]
    while pending:
        node = pending.pop()
        if len(known) > _FAR or _elements(node) != elements:
            return False
        for neighbour in _neighbours(node):
            if neighbour is None:
                return False
            if neighbour not in known:
                known.add(neighbour)
                pending.append(neighbour)
    return True


def _neighbours(node: Node) -> Iterator[Node | None]:
    """What computes element by element beside ``node``; None for what computes otherwise."""
    if not is_product(node):
        operands = node.all_input_nodes
        for given in operands[:1] if node.target is probe else operands:
            if given.op not in ("placeholder", "get_attr"):
                yield given if is_product(given) or _is_pointwise(given) else None
    for user in node.users:
        if _is_pointwise(user):
            yield user
        elif not (is_product(user) or sites_of(user) or user.op == "output"):
            yield None


def _elements(node: Node) -> int | None:
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or any(not isinstance(n, int) for n in value.shape):
        return None
    return math.prod(value.shape)


def _is_pointwise(node: Node) -> bool:
    return node.target is probe or kind_of(node)[0]
