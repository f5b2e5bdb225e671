"""The first items of a batch: which tensors hold items, and where."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch.fx import Node

from tmm.core.torch_private import FakeTensor, tree_leaves, tree_map
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.values import set_value, value_of


class SamplesError(ValueError):
    """The first items of a batch cannot be compared alone."""


@dataclass(frozen=True)
class Samples:
    """The first ``kept`` items of a batch, whose size a trace left open as the symbol ``batch``.

    Sizes that hold the symbol tell where the items lie in a traced tensor.
    """

    batch: sympy.Symbol
    kept: int

    def has_items(self, value: object) -> bool:
        """Whether a traced value, or one in it, has a size that depends on that of the batch."""
        sizes: list[object] = []
        for leaf in tree_leaves(value):
            shape = leaf.shape if isinstance(leaf, torch.Tensor) else leaf
            sizes += shape if isinstance(shape, torch.Size) else [shape]
        return any(isinstance(s, torch.SymInt) and self.batch in _free(s) for s in sizes)

    def example(self, value: object) -> object:
        """What a traced value would be for these items alone; tensors share nothing with it."""
        return tree_map(self._example, value)

    def can_be_told_apart(self, example: torch.Tensor) -> bool:
        """Whether the items are the outermost part of no more than one dimension."""
        return not self.has_items(example) or self.dimension(example) is not None

    def insert_narrow(self, at: Rewriter, tensor: Node) -> Node:
        """Insert a view of these items of ``tensor``, in which they can be told apart."""
        example = value_of(tensor)
        dimension = self.dimension(example)
        assert dimension is not None
        length: Any = self._size(example.shape[dimension])
        arguments = (tensor, dimension, 0, self._insert_size(at, length))
        return at.add("call_method", "narrow", arguments, {}, example.narrow(dimension, 0, length))

    def dimension(self, example: torch.Tensor) -> int | None:
        """The one dimension that items lie in, outermost as far as sizes tell; None for several."""
        found = [i for i, size in enumerate(example.shape) if self.has_items(size)]
        if len(found) != 1:
            return None
        others = sympy.simplify(expression(example.shape[found[0]]) / self.batch)
        return None if self.batch in others.free_symbols else found[0]

    def _insert_size(self, at: Rewriter, size: int | torch.SymInt) -> Node | int:
        """Insert the computation of a size: a product of the sizes that a graph is given."""
        if isinstance(size, int):
            return size
        placeholders = at.graph.find_nodes(op="placeholder")
        examples = {node: value_of(node) for node in placeholders}
        given = {e.node.expr: node for node, e in examples.items() if isinstance(e, torch.SymInt)}
        result: Any = 1
        for factor in sympy.Mul.make_args(expression(size)):
            value = int(factor) if factor.is_Integer else given[factor]
            result = at.call(operator.mul, result, value)
        set_value(result, size)
        return cast("Node", result)

    def _example(self, value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            return self._size(value)
        if isinstance(value, torch.Size):
            return tuple(map(self._size, value))
        if not isinstance(value, FakeTensor) or value.is_nested:
            return value
        shape, stride = ([self._size(s) for s in sizes] for sizes in (value.shape, value.stride()))
        with value.fake_mode, torch.no_grad():
            return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)

    def _size(self, size: int | torch.SymInt) -> int | torch.SymInt:
        if not self.has_items(size):
            return size
        assert isinstance(size, torch.SymInt)
        of_items = expression(size).subs(self.batch, self.kept)
        if of_items.is_Integer:
            return int(of_items)
        environment = size.node.shape_env
        found: torch.SymInt = environment.create_symintnode(of_items, hint=None)
        return found


def expression(size: int | torch.SymInt) -> Any:
    """A size as arithmetic on symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)


def _free(size: torch.SymInt) -> Any:
    return size.node.expr.free_symbols
