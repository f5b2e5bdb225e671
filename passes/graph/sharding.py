"""How the local tensors of ranks make up one tensor, as far as a traced graph tells."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.fx import Node

from tmm.core.records import Share
from tmm.passes.graph.known_functions import name_of
from tmm.passes.graph.values import local_example, value_of
from tmm.passes.request import PlacementRequest

_CUT_ROWS = "its norms are of rows, which are split over ranks"
_UNSUMMED = "its elements are sums over ranks, of which each has a part"


@dataclass(frozen=True)
class Placed:
    """The placements of a tensor on a mesh; without a mesh, all ranks hold the same values.

    ``is_even`` tells that it is known to be split into parts of one size.
    """

    mesh: Any = None
    placements: tuple[Any, ...] = ()
    is_even: bool = field(default=False, compare=False)

    @staticmethod
    def of(tensor: object) -> Placed | None:
        """That of a ``DTensor``; None for anything else."""
        if isinstance(tensor, DTensor):
            # A mesh that is an input of the graph is traced as a stand-in.
            mesh = getattr(tensor.device_mesh, "real_obj", tensor.device_mesh)
            sizes = zip(mesh.mesh.shape, tensor.placements, strict=True)
            is_even = all(
                isinstance(whole := tensor.shape[how.dim], int) and whole % size == 0
                for size, how in sizes
                if isinstance(how, Shard)
            )
            return Placed(mesh, tuple(tensor.placements), is_even)
        return None

    @property
    def dimension(self) -> int | None:
        """The dimension in which ranks of a mesh of one dimension have parts, if they do."""
        if len(self.placements) != 1 or not isinstance(self.placements[0], Shard):
            return None
        dimension: int = self.placements[0].dim
        return dimension

    def along(self, dimension: int) -> Placed:
        """The parts in another dimension, to which theirs has gone."""
        return replace(self, placements=(Shard(dimension),))

    def of_gradient(self) -> Placed:
        """That of the gradient of the tensor: of a sum over ranks it is the same for each part.

        So torch places gradients at the boundaries of a ``DTensor``, unless told otherwise.
        """
        return replace(self, placements=of_gradient(self.placements))

    @property
    def is_replicated(self) -> bool:
        """Whether all ranks hold the same values."""
        return all(placement.is_replicate() for placement in self.placements)

    @property
    def is_split(self) -> bool:
        """Whether no two ranks of the mesh hold the same element."""
        return bool(self.placements) and not any(
            placement.is_replicate() or placement.is_partial() for placement in self.placements
        )

    def share_of_rows(self, dimensions: int, share: Share) -> Share:
        """What this rank has of the norms of the rows, the last of so many dimensions."""
        is_cut = share.kind == "part" and any(p.is_shard(dimensions - 1) for p in self.placements)
        return Share("unknown", _CUT_ROWS) if is_cut else share

    def share(self, ranks: frozenset[int], *, is_first: bool) -> Share:
        """What this rank has of the tensor, in a model that ``ranks`` share."""
        if any(placement.is_partial() for placement in self.placements):
            return Share("unsummed", _UNSUMMED)
        if self.mesh is None:
            return Share("whole" if is_first else "copy")
        if not ranks <= set(self.mesh.mesh.flatten().tolist()):
            return Share("unknown", "placed on some of the ranks that share the model only")
        places = self.mesh.get_coordinate()
        sizes = self.mesh.mesh.shape
        placed = list(zip(places or (), sizes, self.placements, strict=False))
        if places is None or any(place and how.is_replicate() for place, _, how in placed):
            return Share("copy")
        split = any(size > 1 and not how.is_replicate() for _, size, how in placed)
        return Share("part" if split else "whole")


def of_gradient(placements: Iterable[Any]) -> tuple[Any, ...]:
    """The placements of the gradient of what is placed so, where nothing else is said."""
    return tuple(Replicate() if how.is_partial() else how for how in placements)


def is_distributed(example: object) -> bool:
    """Whether a traced value is a ``DTensor``."""
    return Placed.of(example) is not None


def is_split_along(example: object, dimension: int) -> bool:
    """Whether a traced value is a ``DTensor`` of which ranks have parts in that dimension."""
    placed = Placed.of(example)
    return placed is not None and any(how.is_shard(dimension) for how in placed.placements)


def why_unsummed(example: object) -> str | None:
    """Why a ``DTensor`` has no rows: ranks have not summed their parts yet. None if it may have."""
    placed = Placed.of(example)
    if placed is None or not any(placement.is_partial() for placement in placed.placements):
        return None
    return _UNSUMMED


def has_mask(example: object) -> bool:
    """Whether torch keeps a mask, of an embedding in parts, until ranks sum these."""
    placed = Placed.of(example)
    return placed is not None and any(hasattr(how, "mask_buffer") for how in placed.placements)


def declared_by(user: Node, tensor: Node) -> Placed | None:
    """The placements that a tensor gets when ``user`` makes a ``DTensor`` of it."""
    if user.op != "call_function" or "from_local" not in name_of(user):
        return None
    if not user.args or user.args[0] is not tensor or Placed.of(value_of(tensor)):
        return None
    return Placed.of(value_of(user))


def shape_of(node: Node) -> tuple[str, ...]:
    """The shape of a traced tensor, to compare: numbers of dynamic shapes would be guarded on."""
    return tuple(map(str, value_of(node).shape))


@dataclass
class Placements:
    """What `find_placements` found: of tensors where they are made, of marks where they stand.

    ``reasons`` tell why others are not known; ``derived`` are those that follow from operands;
    ``given`` are inputs of the graph that were found to be placed so when it was traced. The
    outputs of the graph are ``returned``.
    """

    request: PlacementRequest
    known: dict[Node, Placed] = field(default_factory=dict)
    reasons: dict[Node, str] = field(default_factory=dict)
    derived: set[Node] = field(default_factory=set)
    given: dict[Node, Placed] = field(default_factory=dict)
    returned: Sequence[Placed | None] = ()

    def share(self, *nodes: Node) -> Share:
        """What this rank has of marked tensors, or of what is computed from tensors."""
        for node in nodes:
            if node not in self.known:
                return Share("unknown", self.reasons.get(node, "of unknown origin"))
        found = {self.known[node] for node in nodes}
        if len(nodes) > 1 and not all(placed.is_replicated for placed in found):
            return Share("unknown", "computed from the parts of tensors that this rank has")
        shares = {self.share_of(placed) for placed in found}
        return shares.pop() if len(shares) == 1 else Share("unknown", "placed on several meshes")

    def share_of_rows(self, mark: Node, tensor: Node) -> Share:
        """What this rank has of the norms of the rows, the last dimension, of a marked tensor."""
        placed, share = self.known.get(mark), self.share(mark)
        return share if placed is None else placed.share_of_rows(value_of(tensor).dim(), share)

    def first_head(self, *nodes: Node) -> int | None:
        """The number, among all ranks' heads, of the first one of this rank; None if not known.

        Of tensors of shape (batch, heads, ...), all of which are split into equal parts by heads.
        """
        placed = self.known.get(nodes[0])
        if placed is None or placed.dimension != 1 or not placed.is_even:
            return None
        if any(self.known.get(node) != placed for node in nodes):
            return None
        example = local_example(value_of(nodes[0]))
        (place,) = placed.mesh.get_coordinate() or (None,)
        if place is None or example.dim() != 4 or self.share(nodes[0]).kind != "part":
            return None
        return int(place * example.shape[1])

    def are_items(self, *nodes: Node) -> bool:
        """Whether tensors of shape (batch, heads, ...) are all split by the items of the batch."""
        found = {self.known.get(node) for node in nodes}
        placed = found.pop()
        is_split = not found and placed is not None and placed.dimension == 0
        return is_split and all(value_of(node).dim() == 4 for node in nodes)

    def share_of(self, placed: Placed) -> Share:
        """What this rank has of a tensor that is placed so."""
        return placed.share(self.request.ranks, is_first=self.request.is_first)
