"""How the processes of a training share one model: who measures what, and what gradients mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from tmm.core.keys import key_of
from tmm.core.module_names import Assembly, parameter_names
from tmm.core.records import Measurement, Site
from tmm.core.torch_private import localized_spec
from tmm.kernels.dense import packed_dtype
from tmm.spec.holders import Holders, strangers

Placement = Literal["shard", "replicate"]
"""How the local tensors of ranks make up one: parts of it that differ, or all of it on each."""

Exchange = Callable[[object], list[Any]]
"""Gives the values of all ranks, in order."""

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})

_AT_ONCE = 1 << 20  # elements that are read in float64

_STRANGERS = (
    "the models of ranks {} and {} have no parameter name in common. If they are stages of a"
    " pipeline, give the schedule of torch.distributed.pipelining in the place of the model;"
    " distributed=False measures each rank by itself"
)
_OF_A_PART = "a function sees the part that a rank has; built-in metrics join"


@dataclass(frozen=True)
class TensorParallel:
    """That ranks hold parts of the tensors of one forward pass, and which ranks do.

    ``ranks`` are those that this one shares tensors with; of what all of them hold alike, the one
    that ``is_first`` measures. ``equal`` are the names of parameters that are no ``DTensor``, and
    had the same values on all of them at the beginning; ``declared`` what the user says.
    """

    ranks: frozenset[int]
    is_first: bool
    equal: frozenset[str] = frozenset()
    declared: tuple[tuple[str, Placement], ...] = ()

    def placement(self, name: str) -> Placement | None:
        """What the user says about the output of the module of that name, or a recorded value."""
        found = (word for pattern, word in self.declared if re.match(pattern, name))
        return next(found, None)


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those whose rows are joined.

    ``averaged`` is of how many ranks' losses the loss of the whole batch is the mean, so that
    gradients of activations are divided by it: those that begin with equal parameters, where
    no wrapper says more. ``averages`` is whether a wrapper in the model, such as
    ``DistributedDataParallel``, is known to average the gradients of parameters so, or nothing is
    to be averaged. ``copies`` are meshes, by their ranks, that hold the same parameters as those
    of earlier ranks; ``holders`` tells which ranks hold those that are no ``DTensor``.
    """

    rank: int = 0
    size: int = 1
    averaged: float = 1.0
    averages: bool = True
    tensor_parallel: TensorParallel | None = None
    copies: frozenset[tuple[int, ...]] = field(default=frozenset())
    holders: Holders = field(default=Holders(), compare=False)

    @classmethod
    def of(
        cls,
        module: torch.nn.Module,
        exchange: Exchange,
        placements: Mapping[str, str] | None = None,
    ) -> Ranks:
        """As torch.distributed and the wrappers in ``module`` say; all ranks call it together.

        Raises:
            ValueError: if ranks have models that have no parameter in common.
        """
        parameters = {name: p for p, (name, _) in parameter_names(module).items()}
        meshes = forward_meshes(module)
        around = frozenset(rank for mesh in meshes for rank in ranks_of(mesh))
        held = {
            name: ranks_of(mesh)
            for name, parameter in parameters.items()
            if (mesh := mesh_of(parameter)) is not None
        }
        averaged, size = _averaged(module), dist.get_world_size()
        averages = averaged is not None
        values: dict[str, object] = {}
        if meshes or not averages:
            values = {name: _fingerprint(p) for name, p in parameters.items()}
        everywhere = exchange((held, values, tuple(parameters)))
        names = [theirs for _, _, theirs in everywhere]
        if not isinstance(module, Assembly) and (two := strangers(names)) is not None:
            raise ValueError(_STRANGERS.format(*two))
        holders = Holders.of(names)
        first: dict[str, tuple[int, ...]] = {}
        for others, _, _ in everywhere:
            for name, ranks in others.items():
                first[name] = min(ranks, first.get(name, ranks))
        tensor_parallel = None
        if meshes:
            theirs = [everywhere[rank][1] for rank in around]
            equal = (
                name
                for name, value in values.items()
                if value is not None and all(other.get(name) == value for other in theirs)
            )
            is_first = all(set(mesh.get_coordinate() or ()) == {0} for mesh in meshes)
            declared = tuple((placements or {}).items())
            tensor_parallel = TensorParallel(around, is_first, frozenset(equal), declared)  # type: ignore[arg-type]
        if averaged is None:
            # Whoever averages gradients: models that are equal have parts of one batch.
            are_equal = meshes or _agree(theirs for _, theirs, _ in everywhere)
            alike = size if holders.fewest is None else holders.fewest
            averaged = float(alike // max(len(around), 1)) if are_equal else 1.0
            averages = holders.are_single
        return cls(
            *(dist.get_rank(), size, averaged, averages, tensor_parallel),
            frozenset(ranks for name, ranks in held.items() if ranks != first[name]),
            holders,
        )

    def notes(self, family: str) -> str:
        """What readers of the rows of ``family`` should know, in a few words."""
        if family != "activation_gradient" or self.averages:
            return ""
        if self.averaged != 1.0:
            return "of the mean of the ranks' losses"
        return "of each rank's own loss" if self.tensor_parallel is None else ""

    def owns(self, tensor: torch.Tensor, name: str) -> bool:
        """Whether this rank measures the tensor of that name, or the part of it that it holds.

        Of what several ranks hold alike, the first one does: everything is counted once.
        """
        if self.size == 1:
            return True
        if not is_distributed(tensor):
            return self.rank == self.holders.first.get(name, 0)
        places = tensor.device_mesh.get_coordinate()
        if places is None or ranks_of(tensor.device_mesh) in self.copies:
            return False
        return all(
            place == 0
            for place, placement in zip(places, tensor.placements, strict=True)
            if placement.is_replicate()
        )

    def owned(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Those that this rank measures, see ``owns``."""
        if self.size == 1:
            return dict(tensors)
        return {name: tensor for name, tensor in tensors.items() if self.owns(tensor, name)}

    def placed(self, measurement: Measurement, reasons: dict[str, str]) -> Site | None:
        """The site under which this rank records a measurement; None if another one does.

        The measurement's site is named as in keys. What each rank records under a name of its own
        is noted in ``reasons``.
        """
        site, share = measurement.site, measurement.share
        if share is None or self.tensor_parallel is None:
            return site
        kind, reason = share.kind, share.reason
        if kind == "unknown" and not measurement.is_of_input:
            declared = self.tensor_parallel.placement(site.module)
            if declared == "shard" and not measurement.reduction.is_row_norm:
                kind = "part"
            elif declared == "replicate" and measurement.family != "activation_gradient":
                kind = "whole" if self.tensor_parallel.is_first else "copy"
        if kind == "copy":
            return None
        if kind == "part" and measurement.reduction.function is not None:
            kind, reason = "unknown", _OF_A_PART
        if kind != "unknown":
            return site
        site = replace(site, rank=self.rank)
        reasons[key_of(measurement.family, site.named(site.module + site.path))] = reason
        return site


def check_placements(placements: Mapping[str, str] | None, modules: Iterable[str]) -> None:
    """Raise ``ValueError`` for what ``placements=`` of ``tmm.instrument`` cannot be."""
    names = tuple(modules)
    for pattern, word in (placements or {}).items():
        if word not in get_args(Placement):
            raise ValueError(
                f"placements={{{pattern!r}: {word!r}}}: write 'shard' where each rank has a part of"
                " the output, or 'replicate' where each has all of it"
            )
        try:
            matches = any(re.match(pattern, name) for name in names)
        except re.error as error:
            raise ValueError(
                f"placements={{{pattern!r}: {word!r}}}: the pattern is no regular expression:"
                f" {error}"
            ) from error
        if not matches:
            raise ValueError(
                f"placements={{{pattern!r}: {word!r}}} matches none of the {len(names)} modules"
                f" (re.match, from the start of the name), such as"
                f" {', '.join(map(repr, names[:5]))}"
            )


def is_joined() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def other_rank() -> int | None:
    """The rank of this process, where another one records for it; else None."""
    return (dist.get_rank() or None) if is_joined() else None


def is_distributed(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether it is a ``DTensor``, of which each rank holds a part."""
    return isinstance(tensor, DTensor)


def are_plain(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether none of them is a ``DTensor``, nor of any other class of its own: quickly told."""
    return _PLAIN.issuperset(map(type, tensors))


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ranks hold different parts of it."""
    return is_distributed(tensor) and not all(p.is_replicate() for p in tensor.placements)


def mesh_of(parameter: torch.Tensor) -> DeviceMesh | None:
    """The mesh whose ranks have parts of a parameter, or all of it; None for a plain one."""
    if is_distributed(parameter):
        return parameter.device_mesh
    spec = localized_spec(parameter)
    return None if spec is None else spec.mesh


def ranks_of(mesh: DeviceMesh) -> tuple[int, ...]:
    """The ranks of a mesh, in its order."""
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return tuple(ranks)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a ``DTensor``; any other tensor as it is."""
    if not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        part: torch.Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """All of a ``DTensor``, whose ranks call this together; any other tensor as it is."""
    if not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        whole: torch.Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return whole


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor whose elements are there; of a ``DTensor`` that ranks have yet to sum, the sum.

    So are gradients of parameters that all ranks hold alike and use on parts of a sequence. The
    ranks of its mesh call this together.
    """
    if not is_distributed(tensor) or not any(p.is_partial() for p in tensor.placements):
        return tensor
    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    with torch.no_grad():
        whole: torch.Tensor = tensor.detach().redistribute(placements=placements)  # type: ignore[attr-defined]
    return whole


def check_distributed(module: torch.nn.Module) -> None:
    """Raise for what cannot be measured on several ranks.

    Raises:
        ValueError: for ``FullyShardedDataParallel``, an engine of DeepSpeed, and
            ``DistributedDataParallel`` with a mesh that has run already.
    """
    for child in module.modules():
        if type(child).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel flattens parameters, which have no names then; shard"
                " with torch.distributed.fsdp.fully_shard"
            )
        if type(child).__name__ == "DeepSpeedEngine":
            raise ValueError(
                "DeepSpeedEngine reduces gradients, and keeps parts of parameters, in ways of its"
                " own, which tmm does not know; give distributed=False to measure what each rank"
                " has, or shard with torch.distributed.fsdp.fully_shard"
            )
        is_wrapper = isinstance(child, DistributedDataParallel)
        wraps_mesh = is_wrapper and getattr(child, "device_mesh", None) is not None
        if wraps_mesh and any(map(_has_lost_parameters, child.modules())):
            raise ValueError(
                "DistributedDataParallel with a mesh has taken the parameters out of the modules in"
                " its first forward pass; instrument the model before that"
            )


def _has_lost_parameters(module: torch.nn.Module) -> bool:
    return any(isinstance(value, DTensor) for value in vars(module).values())


def forward_meshes(module: torch.nn.Module) -> list[DeviceMesh]:
    """The meshes over which forward passes are split: those of parameters, without FSDP's.

    Nor those of experts, of which ranks have some each: they have different data, since they are
    among the ranks over which gradients of other parameters are averaged.
    """
    by_fsdp: dict[torch.nn.Parameter, DeviceMesh | None] = {}
    for group in fsdp_groups(module):
        for parameter in group.fsdp_params:
            spec = parameter._unsharded_dtensor_spec if parameter.is_dtensor else None
            by_fsdp[parameter.sharded_param] = None if spec is None else spec.mesh
    found = (by_fsdp.get(p, mesh_of(p)) for p in module.parameters())
    with_other_data = list(_ranks_with_other_data(module))
    return [
        mesh
        for mesh in dict.fromkeys(mesh for mesh in found if mesh is not None and mesh.size() > 1)
        if not any(len(ranks.intersection(ranks_of(mesh))) > 1 for ranks in with_other_data)
    ]


def _ranks_with_other_data(module: torch.nn.Module) -> Iterator[frozenset[int]]:
    """The groups of ranks, this one among them, over which wrappers average gradients."""
    for group in fsdp_groups(module):
        yield frozenset(ranks_of(group.mesh_info.mesh))
    for child in module.modules():
        if isinstance(child, DistributedDataParallel):
            yield frozenset(dist.get_process_group_ranks(child.process_group))


def _fingerprint(parameter: torch.Tensor) -> object:
    """Equal for parameters of which ranks hold the same values; None for one without values."""
    if parameter.is_meta:
        return None
    sums = []
    for part in local_part(parameter).detach().flatten().split(_AT_ONCE):
        values = part.to(packed_dtype(part.device))
        weights = torch.linspace(1, 2, len(part), dtype=values.dtype, device=part.device)
        sums += [values.sum(), values @ weights]
    found: list[float] = torch.stack(sums).tolist() if sums else []
    return tuple(parameter.shape), tuple(found)


def _agree(everywhere: Iterable[Mapping[str, object]]) -> bool:
    """Whether what ranks have of one name is equal on all that have it."""
    first: dict[str, object] = {}
    return all(first.setdefault(n, v) == v for own in everywhere for n, v in own.items())


def fsdp_groups(module: torch.nn.Module) -> Iterator[Any]:
    """What ``fully_shard`` keeps of the parameters that it gathers together."""
    for child in module.modules():
        state = getattr(child, "_get_fsdp_state", None)
        if state is None:
            continue
        # Several, where parameters of one module are sharded over several meshes (torch 2.13).
        several = getattr(state(), "_fsdp_param_groups", None)
        yield from filter(None, [state()._fsdp_param_group] if several is None else several)


def _averaged(module: torch.nn.Module) -> float | None:
    """Over how many ranks a wrapper in the model averages gradients; None without one."""
    for child in module.modules():
        if isinstance(child, DistributedDataParallel):
            return float(dist.get_world_size(child.process_group))
    # Those of experts are a part of the ranks that have data of their own.
    widest = max(fsdp_groups(module), key=lambda group: group.mesh_info.mesh.size(), default=None)
    if widest is None:
        return None
    return float(widest.gradient_divide_factor or widest.mesh_info.mesh.size())
