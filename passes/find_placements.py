"""Which tensors of a graph the ranks of a tensor parallel model hold alike, and which in parts."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch.distributed.tensor import Replicate
from torch.fx import GraphModule, Node

from tmm.passes.findings import GraphFindings
from tmm.passes.graph.dropout_functions import random_function
from tmm.passes.graph.edits import storages
from tmm.passes.graph.known_functions import is_of_torch, kind_of, name_of
from tmm.passes.graph.mutation import overwritten_by
from tmm.passes.graph.placed_edges import placed_edge
from tmm.passes.graph.sharding import Placed, Placements, declared_by, shape_of
from tmm.passes.graph.split_dimensions import split_dimension
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import is_mark
from tmm.passes.graph.values import argument_of, value_of
from tmm.passes.request import GraphRequest, PlacementRequest

_OF_AN_INPUT = "an input of the graph, of which no DTensor says how ranks share it"


def find_placements(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Find out how ranks share the tensors of a graph, of those where that is certain.

    The placements of a ``DTensor`` are its own, and those of its local tensor. What becomes a
    ``DTensor`` has the placements that the program gives it then. Pointwise operations keep the
    placements of operands that have the same; other deterministic ones that of operands which all
    ranks hold alike. Random numbers, cutting out of tensors and inputs of the graph are not known,
    nor what is overwritten by them. Changes nothing.
    """
    assert request.placements is not None
    found.placements = placements_of(module, request.placements)


def placements_of(module: GraphModule, request: PlacementRequest) -> Placements:
    """The same, of a graph alone."""
    found = Placements(request)
    found.returned = [placed for placed, _ in _Forward(module, found, {}).run()]
    return found


class _Forward:
    """Follows the tensors of a graph in order; a tensor that is overwritten is a new one."""

    def __init__(
        self, module: GraphModule, found: Placements, given: Mapping[Node, Placed]
    ) -> None:
        self.module = module
        self.found = found
        self.now: dict[Node, Placed] = dict(given)
        self.why: dict[Node, str] = {}
        self.items: dict[Node, Sequence[tuple[Placed | None, str]]] = {}
        self.unsummed: set[Node] = set()
        self.bodies = dict(nested_calls(module))
        self.nodes = list(module.graph.nodes)
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self.overwritten = {
            node: storages([target])
            for node in self.nodes
            if (target := overwritten_by(node)) is not None
        }

    def run(self) -> Sequence[tuple[Placed | None, str]]:
        """Fill in what is found; gives that of the graph's outputs."""
        for node in self.nodes:
            if node.op == "output":
                break
            if is_mark(node) and isinstance(node.args[0], Node):
                self._keep(node, node.args[0])
                self._set(node, *self._state(node.args[0]))
                continue
            self._set(node, *self._result(node))
            if (target := overwritten_by(node)) is not None:
                self._overwrite(target, node)
            self._keep(node, node)
        (returned,) = self.module.graph.output_node().args
        outputs = returned if isinstance(returned, (tuple, list)) else (returned,)
        return [self._state(node) if isinstance(node, Node) else (None, "") for node in outputs]

    def _state(self, node: Node) -> tuple[Placed | None, str]:
        return self.now.get(node), self.why.get(node, "")

    def _set(self, node: Node, placed: Placed | None, reason: str) -> None:
        for declared in self._declared(node):
            if placed is None or (placed.mesh is None and declared.is_replicated):
                placed = declared
            elif placed != declared:
                placed, reason = None, "the program declares it in different ways"
                break
        if placed is None:
            self.now.pop(node, None)
            self.why[node] = reason
        else:
            self.now[node] = placed

    def _keep(self, node: Node, tensor: Node) -> None:
        """Note what is known here of a tensor, for the node."""
        placed, reason = self._state(tensor)
        if placed is None:
            self.found.reasons[node] = reason
        else:
            self.found.known[node] = placed

    def _overwrite(self, target: Node, by: Node) -> None:
        memory = storages([target])
        for other in [*self.now]:
            if other not in (by, target) and storages([other]) & memory:
                self._set(other, None, f"overwritten by {name_of(by)}")
                self.found.known.pop(other, None)
        self._set(target, *self._state(by))

    def _declared(self, node: Node) -> Iterator[Placed]:
        """What becomes of the tensor later, as it is now: the placements of that ``DTensor``."""
        start, memory = self.order[node], storages([node])
        for user in node.users:
            declared = declared_by(user, node)
            if declared is not None and not any(
                start < self.order[other] < self.order[user] and written & memory
                for other, written in self.overwritten.items()
            ):
                yield declared

    def _result(self, node: Node) -> tuple[Placed | None, str]:
        example = value_of(node)
        if (placed := Placed.of(example)) is not None:
            return placed, ""
        if node.op == "placeholder":
            return self._input(node)
        if node in self.bodies:
            self._enter(node)
            return None, ""
        if node.target is operator.getitem and node.args[0] in self.items:
            items, index = self.items[node.args[0]], node.args[1]  # type: ignore[index]
            assert isinstance(index, int)
            return items[index] if index < len(items) else (None, "")
        source = node.args[0] if node.args else None
        if isinstance(source, Node) and (whole := Placed.of(value_of(source))):
            return _left(node, whole)
        return self._computed(node)

    def _input(self, node: Node) -> tuple[Placed | None, str]:
        if node in self.now:
            return self.now[node], ""
        argument = argument_of(node)
        if argument is not None and id(argument.example) in self.found.request.equal:
            return Placed(), ""
        if argument is not None and isinstance(argument.example, torch.Tensor):
            placed = placed_edge(argument.example).tensor
            if placed is not None:
                self.found.given[node] = placed
                return placed, ""
        return None, self.why.get(node, _OF_AN_INPUT)

    def _enter(self, call: Node) -> None:
        """Follow tensors into a nested graph that runs once, and out of it."""
        body = self.bodies[call]
        if not returns_body_outputs(call):
            return
        inside = _Forward(body, self.found, {})
        for inner, outer in zip(
            body.graph.find_nodes(op="placeholder"), call.args[1:], strict=False
        ):
            if isinstance(outer, Node):
                inside.why[inner] = self.why.get(outer, "")
                if outer in self.now:
                    inside.now[inner] = self.now[outer]
        self.items[call] = inside.run()

    def _computed(self, node: Node) -> tuple[Placed | None, str]:
        if node.op not in ("call_function", "call_method"):
            return None, f"{name_of(node)} of the graph"
        operands = [n for n in node.all_input_nodes if _is_tensor(n)]
        if (parts := self._apart(node, operands)) is not None:
            self.found.derived.add(node)
            if isinstance(several := value_of(node), (tuple, list)):
                self.items[node] = [(parts, "")] * len(several)
            return parts, ""
        for operand in operands:
            if operand not in self.now:
                return None, self.why.get(operand, "")
        pointwise, deterministic = kind_of(node)
        name = name_of(node)
        if not operands or not (pointwise or deterministic):
            return None, f"made by {name}, which ranks may call in different ways"
        if pointwise and len(operands) < len(node.all_input_nodes):
            return None, f"made by {name} with a size, which may differ between ranks"
        placed, reason = self._follow(node, operands, pointwise=pointwise)
        if placed is not None:
            self.found.derived.add(node)
        return placed, reason

    def _apart(self, node: Node, operands: Sequence[Node]) -> Placed | None:
        """That of a result which is split as operands are; None for anything else.

        What other operands there are, and whether these are known, makes no difference then.
        """
        if any(operand in self.unsummed or self._is_unsummed(operand) for operand in operands):
            self.unsummed.add(node)
            return None
        split: dict[Node, int] = {}
        others = []
        found: set[Placed] = set()
        for operand in operands:
            placed = self.now.get(operand)
            if placed is None or placed.is_replicated:
                others.append(operand)
            elif (dimension := placed.dimension) is None:
                return None
            else:
                split[operand] = dimension
                found.add(placed.along(0))
        if len(found) != 1 or not is_of_torch(node):
            return None
        pointwise, _ = kind_of(node)
        dimension = split_dimension(node, split, others, is_pointwise=pointwise)
        if dimension is None:
            return None
        is_even = all(self.now[operand].is_even for operand in split)
        return replace(found.pop().along(dimension), is_even=is_even)

    def _is_unsummed(self, operand: Node) -> bool:
        placed = self.now.get(operand)
        return placed is not None and any(how.is_partial() for how in placed.placements)

    def _follow(
        self, node: Node, operands: Sequence[Node], *, pointwise: bool
    ) -> tuple[Placed | None, str]:
        name = name_of(node)
        found = {self.now[operand] for operand in operands}
        is_random = bool(random_function(node.target, node.args, node.kwargs))
        if all(placed.is_replicated for placed in found):
            if is_random:
                return None, f"made by {name}, which draws random numbers on each rank"
            on_meshes = {placed for placed in found if placed.mesh is not None}
            if len(on_meshes) > 1:
                return None, f"made by {name} of tensors on several meshes"
            return (on_meshes.pop() if on_meshes else Placed()), ""
        split = {placed for placed in found if not placed.is_replicated}
        if not pointwise or len(split) > 1 or not all(placed.is_split for placed in split):
            return None, f"made by {name} of the parts of tensors that a rank has"
        (parts,) = split
        shape = shape_of(node)
        for operand in operands:
            own = shape_of(operand)
            if self.now[operand] == parts and own != shape:
                return None, f"made by {name}, which expands the part that a rank has"
            if self.now[operand] != parts and not _is_along(own, parts, len(shape)):
                return None, f"made by {name} of a part of a tensor and a whole one"
        return parts, ""


def _left(node: Node, whole: Placed) -> tuple[Placed | None, str]:
    """Of what is no ``DTensor`` any more, and was one."""
    name = name_of(node)
    if "to_local" in name:
        return whole, ""
    if name == "full_tensor":
        return Placed(whole.mesh, (Replicate(),) * len(whole.placements)), ""
    return None, f"made by {name} of a DTensor"


def _is_along(shape: Sequence[str], parts: Placed, dimensions: int) -> bool:
    """Whether a tensor that all ranks hold alike has nothing in the dimensions that are split."""
    for placement in parts.placements:
        place = getattr(placement, "dim", None)
        if place is None:
            return False
        own = len(shape) - (dimensions - place)
        if own >= 0 and shape[own] != "1":
            return False
    return True


def _is_tensor(node: Node) -> bool:
    return isinstance(value_of(node), torch.Tensor) or node.op == "get_attr"
