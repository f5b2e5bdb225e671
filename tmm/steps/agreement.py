"""Whether ranks that hold the same parameters hold the same bits: one small collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tmm.core.module_names import ParameterNames
from tmm.core.torch_private import device_of_collectives
from tmm.spec.gathering import Gathering
from tmm.spec.ranks import is_distributed, is_joined, local_part

_AT_ONCE = 1 << 20  # elements that are read in 64 bits
_WORD = (1 << 64) - 1
_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SHOWN = 3


@dataclass(frozen=True)
class Agreement:
    """Whether all replicas of parameters hold the same bits; true if they do.

    ``compared`` is how many parameters several ranks hold alike. ``differing`` are the names of
    those that differ, in the order of the model, and ``ranks`` are those that hold another one of
    the ``first`` than most do.
    """

    compared: int
    differing: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return not self.differing

    @property
    def first(self) -> str | None:
        """The first parameter that differs."""
        return self.differing[0] if self.differing else None

    def __str__(self) -> str:
        if not self.differing:
            return f"the replicas of {self.compared} parameters hold the same"
        ranks = ", ".join(map(str, self.ranks))
        shown = ", ".join(self.differing[:_SHOWN])
        more = f" and {len(self.differing) - _SHOWN} more" if len(self.differing) > _SHOWN else ""
        return (
            f"replicas hold different parameters: {len(self.differing)} of {self.compared}, first"
            f" {self.differing[0]}, which rank{'s' * (len(self.ranks) > 1)} {ranks} and the others"
            f" do not have alike ({shown}{more})"
        )


def replicas_agree(model: torch.nn.Module) -> Agreement:
    """Compare the parameters that several ranks hold alike, bit by bit, now.

    As they are with ``DistributedDataParallel``, with ``fully_shard`` over a mesh of two dimensions
    (each part with its replicas), and where nothing wraps the model and ranks average gradients
    themselves. All ranks call it together, between steps. Ranks send 16 bytes for each parameter in
    one sum over all of them, and more only if some differ. Parts that no other rank has are not
    compared.

    ``tmm.Spec(..., replicas_agree=100)`` does this by itself at each hundredth step.

    Raises:
        TypeError: if ``model`` is not a module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model={model!r} is not a module")
    return ReplicaCheck(model)()


class ReplicaCheck:
    """Compares the parameters of one model; what ranks hold together is found out the first time.

    All ranks call it together. The sum is one of terms that cancel if all ranks that share a
    parameter have the same checksum, and otherwise do not, but for one case in 2**63 or so.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._names = ParameterNames(module)
        self._gathering = Gathering(module)
        self._group = _group_of(module)
        self._known: tuple[tuple[str, object], ...] | None = None
        self._compared = 0
        self._places: dict[str, int] = {}
        self._factors: dict[str, int] = {}

    def __call__(self) -> Agreement:
        """Whether they are equal."""
        if not is_joined():
            return Agreement(0)
        held = dict(self._held())
        self._learn(held)
        checksums = _checksums(held)
        terms = [[0, 0] for _ in self._places]
        for name, sums in checksums.items():
            factor = self._factors[name]
            terms[self._places[name]] = [_signed(factor * _mixed(number)) for number in sums]
        # Not where the parameters lie: ranks may have offloaded theirs.
        total = torch.tensor(terms, dtype=torch.int64, device="cpu")
        total = total.to(device_of_collectives(self._group))
        dist.all_reduce(total, group=self._group)
        rows = total.tolist()
        differing = tuple(name for name, row in zip(self._places, rows, strict=True) if any(row))
        if not differing:
            return Agreement(self._compared)
        ranks = self._ranks_apart(differing[0], checksums)
        return Agreement(self._compared, differing, ranks)

    def _held(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The parameters with values; of what is gathered just now, the part of this rank."""
        shards = {id(whole): shard for shard, whole in self._gathering.pairs()}
        for parameter, name in self._names().items():
            own = shards.get(id(parameter), parameter)
            if not own.is_meta:
                yield name, own

    def _learn(self, held: Mapping[str, torch.Tensor]) -> None:
        """Find out which ranks hold what this one holds."""
        parts = tuple((name, _part(tensor)) for name, tensor in held.items())
        if parts == self._known:
            return
        everywhere: list[dict[str, object]] = [{} for _ in range(dist.get_world_size(self._group))]
        dist.all_gather_object(everywhere, dict(parts), group=self._group)
        names = dict.fromkeys(name for theirs in everywhere for name in theirs)
        self._places = {name: place for place, name in enumerate(names)}
        self._compared = sum(
            any(count > 1 for count in Counter(t[name] for t in everywhere if name in t).values())
            for name in names
        )
        rank = dist.get_rank(self._group)
        for name, part in parts:
            sharing = [r for r, theirs in enumerate(everywhere) if theirs.get(name) == part]
            self._factors[name] = _factors(len(sharing))[sharing.index(rank)]
        self._known = parts

    def _ranks_apart(self, name: str, checksums: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
        """The ranks that hold another parameter of that name than most that share it."""
        own = None
        if name in checksums and self._known is not None:
            own = dict(self._known)[name], tuple(checksums[name])
        everywhere: list[object] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everywhere, own, group=self._group)
        most: dict[object, tuple[int, ...]] = {}
        found = [pair for pair in everywhere if isinstance(pair, tuple)]
        for part in dict.fromkeys(part for part, _ in found):
            counts = Counter(sums for other, sums in found if other == part)
            most[part] = counts.most_common(1)[0][0]
        return tuple(
            _global(rank, self._group)
            for rank, pair in enumerate(everywhere)
            if isinstance(pair, tuple) and most[pair[0]] != pair[1]
        )


def _group_of(module: torch.nn.Module) -> dist.ProcessGroup | None:
    """The ranks that the model is copied to; None for all."""
    for child in module.modules():
        if isinstance(child, DistributedDataParallel):
            group: dist.ProcessGroup = child.process_group
            return group
    return None


def _global(rank: int, group: dist.ProcessGroup | None) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _part(tensor: torch.Tensor) -> object:
    """Equal on ranks that are to hold the same of a parameter."""
    if not is_distributed(tensor):
        return tuple(tensor.shape)
    places = tensor.device_mesh.get_coordinate() or ()
    own = tuple(
        -1 if placement.is_replicate() else place
        for place, placement in zip(places, tensor.placements, strict=True)
    )
    return tuple(tensor.shape), str(tensor.placements), tuple(tensor.device_mesh.shape), own


def _factors(count: int) -> Sequence[int]:
    """Numbers that differ, and whose sum is zero in 64 bits; for one rank, nothing is compared."""
    found = [_mixed(place + 1) | 1 for place in range(count - 1)]
    return [*found, -sum(found)]


def _mixed(number: int) -> int:
    """Bits that look like chance, and are others for another number (splitmix64)."""
    number = (number & _WORD) * 0x9E3779B97F4A7C15 & _WORD
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _WORD
    return number ^ number >> 31


def _signed(number: int) -> int:
    number &= _WORD
    return number - (1 << 64) if number >> 63 else number


def _checksums(tensors: Mapping[str, torch.Tensor]) -> dict[str, Sequence[int]]:
    """Two sums over the bits of what this rank holds of each tensor; waits for a device once."""
    sums: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        own = local_part(tensor).detach()
        sums.setdefault(own.device, {})[name] = _sums(own)
    found: dict[str, Sequence[int]] = {}
    for some in sums.values():
        found |= zip(some, torch.stack(list(some.values())).tolist(), strict=True)
    return found


def _sums(own: torch.Tensor) -> torch.Tensor:
    """The sum of the bits of elements, and one that tells in which order they are; shape (2,)."""
    if own.is_complex():
        own = torch.view_as_real(own)
    own = own.reshape(-1)
    total = torch.zeros(2, dtype=torch.int64, device=own.device)
    for start in range(0, own.numel(), _AT_ONCE):
        bits = own[start : start + _AT_ONCE].view(_OF_SIZE[own.element_size()]).to(torch.int64)
        places = torch.arange(start + 1, start + 1 + len(bits), device=own.device)
        # Odd, so that no bit of a change is lost, and spread, so that changes do not cancel.
        weights = places.mul_(_signed(_mixed(1) & ~1)).add_(1)
        total[0] += bits.sum()
        total[1] += (bits * weights).sum()
    return total
