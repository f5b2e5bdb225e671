"""The reference of a model that ``fully_shard`` gathers part by part: gathered likewise."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tmm.spec.ranks import forward_meshes, fsdp_groups, whole_of
from tmm.spec.spec import Spec


class Gathering:
    """Gathers the counterparts of parameters as the model gathers these, and no more of them.

    The parameters of one call of ``fully_shard`` are gathered together; their counterparts are kept
    until one of others is asked for, or until ``release``. So they take as much memory as those of
    the model.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._groups = list(fsdp_groups(module))
        self._group_of: dict[int, int] = {}
        self._current: int | None = None
        self._here: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # keeps the ids valid

    def check(self, spec: Spec, *, runs_branch: bool, is_joined: bool) -> None:
        """Raise ``ValueError`` for what cannot be compared.

        ``runs_branch`` says that the reference runs forward passes of its own; ``is_joined`` that
        all ranks do.
        """
        meshes = forward_meshes(self._module) if runs_branch else []
        if meshes and (reason := self._why_not_split(spec, is_joined=is_joined)):
            raise ValueError(
                "reference=: the forward pass of the model is split over ranks (tensor parallel,"
                f" {meshes[0]}), and {reason}; tmm.parameter_difference can be measured"
            )
        if spec.reference_device is not None and self._has_shards():
            raise ValueError(
                "reference_device=: the parameters of the model are sharded, and those of the"
                " reference lie where these do; leave it out"
            )

    def _why_not_split(self, spec: Spec, *, is_joined: bool) -> str:
        """Why a forward pass that is split over ranks cannot be followed; empty if it can."""
        if not is_joined:
            return (
                "all ranks compute that of the reference together, which distributed=False and"
                " per_rank=True do not promise"
            )
        if self._groups:
            return "its parameters are gathered by fully_shard as well; a reference follows one way"
        if any(getattr(child, "device_mesh", None) for child in _replicas(self._module)):
            return "DistributedDataParallel with a mesh takes the parameters out of the modules"
        if spec.reference_samples is not None:
            return "reference_samples= cannot tell apart the items of tensors that ranks share"
        return ""

    def _has_shards(self) -> bool:
        return any(isinstance(p, DTensor) for p in self._module.parameters())

    @property
    def is_needed(self) -> bool:
        """Whether the model gathers parameters at all."""
        return bool(self._groups)

    def pairs(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each sharded parameter, and the tensor that it has been gathered to at some time."""
        for number, group in enumerate(self._groups):
            for parameter in group.fsdp_params:
                whole = getattr(parameter, "_unsharded_param", None)
                if whole is not None:
                    self._group_of[id(whole)] = number
                    yield parameter.sharded_param, whole

    def is_new(self, own: object) -> bool:
        """Whether a tensor may be one that a parameter was gathered to just now."""
        is_parameter = bool(self._groups) and isinstance(own, torch.nn.Parameter)
        return is_parameter and id(own) not in self._group_of

    def whole(self, kept: DTensor, own: torch.Tensor) -> torch.Tensor:
        """The counterpart of a gathered parameter; ``kept`` is what this rank has of it."""
        if (known := self._here.get(id(own))) is not None:
            return known[1]
        if (group := self._group_of.get(id(own))) != self._current:
            self._here.clear()
            self._current = group
        with torch.no_grad():
            whole = whole_of(kept.to(own.dtype))
        self._here[id(own)] = own, whole
        return whole

    def keeps(self, storage: int) -> bool:
        """Whether a piece of memory is that of a counterpart."""
        return any(whole.untyped_storage()._cdata == storage for _, whole in self._here.values())

    def release(self) -> None:
        """Give up what was gathered."""
        self._here.clear()
        self._current = None


def _replicas(module: torch.nn.Module) -> Iterator[DistributedDataParallel]:
    return (child for child in module.modules() if isinstance(child, DistributedDataParallel))
