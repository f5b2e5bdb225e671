"""How the ranks of a tensor parallel model share the gradients of a graph's tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from tmm.core.records import Share
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.dropout_functions import random_function
from tmm.passes.graph.edits import storages
from tmm.passes.graph.known_functions import name_of
from tmm.passes.graph.mutation import overwritten_by
from tmm.passes.graph.placed_edges import PlacedEdge, PlacedEnds
from tmm.passes.graph.provenance import all_nodes
from tmm.passes.graph.sharding import Placed, Placements, declared_by, shape_of
from tmm.passes.graph.subgraphs import nested_calls
from tmm.passes.graph.taps import is_mark
from tmm.passes.graph.values import value_of
from tmm.passes.request import GraphRequest

_ADD = (operator.add, torch.add, "add")

_OUTSIDE = "its gradient comes from outside of the graph"


def find_gradient_placements(
    module: GraphModule, request: GraphRequest, found: GraphFindings
) -> None:
    """Find, of each mark in a graph, what this rank has of the gradient of the marked tensor.

    That is the gradient from what uses the tensor after the mark. The program itself gives the
    placements of the gradient of a local tensor, where it makes a ``DTensor`` of it or has made it
    of one. Operations whose result follows from operands that ranks share in one way hand those of
    its gradient back to the operands. That of a ``DTensor`` is placed as the tensor is, since the
    probe of it sees to that. Everything else is not known. Changes nothing.
    """
    if found.placements is None:
        return
    gradients = _settled(module, found.placements)
    found.gradient_shares = _all_shares(module, found.placements, gradients)
    (returned,) = module.graph.output_node().args
    outputs = returned if isinstance(returned, (tuple, list)) else (returned,)
    given, places = found.placements.given, module.graph.find_nodes(op="placeholder")
    found.placed_ends = PlacedEnds(
        tuple((place, given[node]) for place, node in enumerate(places) if node in given),
        tuple(
            PlacedEdge(placed, gradients.known.get(node) if isinstance(node, Node) else None)
            for placed, node in zip(found.placements.returned, outputs, strict=True)
        ),
    )


def gradient_shares(module: GraphModule, placements: Placements) -> dict[Node, Share]:
    """The same, of a graph whose placements are known."""
    return _all_shares(module, placements, _settled(module, placements))


def _all_shares(
    module: GraphModule, placements: Placements, gradients: _Gradients
) -> dict[Node, Share]:
    shares = dict(_of_graph(module, placements, gradients))
    for _, body in nested_calls(module):
        shares |= gradient_shares(body, placements)
    return shares


def _settled(module: GraphModule, placements: Placements) -> _Gradients:
    gradients = _Gradients(module, placements)
    gradients.settle()
    return gradients


def _of_graph(
    module: GraphModule, placements: Placements, gradients: _Gradients
) -> Iterator[tuple[Node, Share]]:
    for node in module.graph.nodes:
        if is_mark(node) and isinstance(node.args[0], Node):
            placed, reason = gradients.after(node, node.args[0])
            yield node, Share("unknown", reason) if placed is None else placements.share_of(placed)


class _Gradients:
    """Follows gradients from what uses a tensor to the tensor."""

    def __init__(self, module: GraphModule, placements: Placements) -> None:
        self.module = module
        self.placements = placements
        self.known: dict[Node, Placed] = {}
        targets = (overwritten_by(node) for node in all_nodes(module))
        self.overwritten = storages(target for target in targets if target is not None)

    def settle(self) -> None:
        """Find all that can be known."""
        size = -1
        while size != len(self.known):
            size = len(self.known)
            for node in reversed(self.module.graph.nodes):
                if node not in self.known and (placed := self._of(node)[0]) is not None:
                    self.known[node] = placed
            for node in self.module.graph.nodes:
                if node not in self.known and (placed := self._of_sum(node)) is not None:
                    self.known[node] = placed

    def after(self, mark: Node, tensor: Node) -> tuple[Placed | None, str]:
        """The gradient from what uses ``tensor`` after ``mark``."""
        if (placed := Placed.of(value_of(tensor))) is not None:
            return placed.of_gradient(), ""
        later = [user for user in self._users(tensor) if mark < user]
        if len(later) == len(self._users(tensor)):
            if tensor in self.known:
                return self.known[tensor], ""
            return self._of(tensor)
        return self._from(tensor, later)

    def _users(self, tensor: Node) -> list[Node]:
        """What hands a gradient back to the tensor."""
        return [
            user
            for user in tensor.users
            if not is_mark(user) and (user.op == "output" or _requires_gradient(user))
        ]

    def _of(self, tensor: Node) -> tuple[Placed | None, str]:
        if tensor.op == "call_method" and tensor.target in ("to_local", "full_tensor"):
            placed = self.placements.known.get(tensor)
            return _of_gradient(tensor, placed), "its gradient is placed in a way not known"
        return self._from(tensor, self._users(tensor))

    def _from(self, tensor: Node, users: list[Node]) -> tuple[Placed | None, str]:
        example = value_of(tensor)
        if Placed.of(example) is not None:
            return None, "the gradient of a DTensor may be placed in another way than it is"
        if not users:
            return None, "nothing in the graph uses it"
        if storages([tensor]) & self.overwritten:
            return None, "it is overwritten"
        found: set[Placed] = set()
        for user in users:
            placed, reason = self._by(user, tensor)
            if placed is None:
                return None, reason
            found.add(placed)
        if all(placed.is_replicated for placed in found):
            found = {placed for placed in found if placed.mesh is not None} or {Placed()}
        if len(found) > 1:
            return None, "what uses it gives gradients that are placed in different ways"
        return found.pop(), ""

    def _by(self, user: Node, tensor: Node) -> tuple[Placed | None, str]:
        """The gradient that ``user`` hands back to the tensor."""
        if user.op == "output":
            return None, _OUTSIDE
        if declared := declared_by(user, tensor):
            if name_of(user) != "from_local":
                return None, f"its gradient comes from {name_of(user)}"
            if self.placements.known.get(tensor) != declared:
                return None, "the program declares it in different ways"
            return _of_gradient(user, declared), "its gradient is placed in a way not known"
        own, made = self.placements.known.get(tensor), self.placements.known.get(user)
        if user not in self.placements.derived or own is None or made is None:
            return None, f"its gradient comes from {name_of(user)}, of parts that are not known"
        gradient = self.known.get(user)
        if gradient is None:
            return None, self._of(user)[1]
        if made.is_replicated and own.is_replicated and gradient.is_replicated:
            return gradient, ""
        if own == made == gradient:
            return gradient, ""
        if own.dimension is not None and made.dimension is not None and made == gradient:
            return own, ""  # no rank's part of the result is made of another rank's
        return None, f"its gradient comes from {name_of(user)} of parts that each rank has"

    def _of_sum(self, node: Node) -> Placed | None:
        """The gradient of a sum, which is that of each operand that has no other use.

        Dropout without any is the sum of one.
        """
        is_sum = node.target in _ADD and len(node.args) == 2 and not node.kwargs
        is_same = node.target is torch.nn.functional.dropout and not random_function(
            *(node.target, node.args, node.kwargs)
        )
        if not is_sum and not is_same:
            return None
        if storages([node]) & self.overwritten:
            return None
        for operand in node.args:
            if not isinstance(operand, Node) or operand not in self.known:
                continue
            if shape_of(operand) == shape_of(node) and self._users(operand) == [node]:
                return self.known[operand]
        return None


def _of_gradient(node: Node, placed: Placed | None) -> Placed | None:
    """The placements of a gradient that goes through the boundary of a ``DTensor``.

    Of a sum over ranks, that of each part is the whole gradient.
    """
    if placed is None:
        return None
    given: Any = node.kwargs.get("grad_placements")
    if isinstance(given, Node):
        return None
    return placed.of_gradient() if given is None else Placed(placed.mesh, tuple(given))


def _requires_gradient(node: Node) -> bool:
    example = value_of(node)
    return not isinstance(example, torch.Tensor) or example.requires_grad
