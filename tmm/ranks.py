"""How the processes of a training share one model: who measures what, and what gradients mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tmm.reference import Reference


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those whose rows are joined.

    ``averaged`` is over how many ranks the gradients of parameters are averaged, as by
    ``DistributedDataParallel``: the loss of the whole batch is the mean of their losses, so that
    gradients of activations are divided by it.
    """

    rank: int = 0
    size: int = 1
    averaged: float = 1.0

    @classmethod
    def of(cls, module: torch.nn.Module, reference: Reference | None) -> Ranks:
        """As torch.distributed and the wrappers in ``module`` say.

        Raises:
            ValueError: for ``FullyShardedDataParallel``, or a reference of sharded parameters.
        """
        for child in module.modules():
            if type(child).__name__ == "FullyShardedDataParallel":
                raise ValueError(
                    "FullyShardedDataParallel flattens parameters, which have no names then; shard"
                    " with torch.distributed.fsdp.fully_shard"
                )
        if reference is not None and any(map(is_sharded, module.parameters())):
            raise ValueError(
                "reference=: the parameters of the model are sharded; differences and tmm.rcc need"
                " whole ones, as with DistributedDataParallel"
            )
        return cls(dist.get_rank(), dist.get_world_size(), _averaged(module))

    def owns(self, tensor: torch.Tensor) -> bool:
        """Whether this rank measures the tensor, or the part of it that it holds.

        Of what several ranks hold alike, the first one does: everything is counted once.
        """
        if self.size == 1:
            return True
        if not is_distributed(tensor):
            return self.rank == 0
        places = tensor.device_mesh.get_coordinate()
        if places is None:
            return False
        return all(
            place == 0
            for place, placement in zip(places, tensor.placements, strict=True)
            if placement.is_replicate()
        )


def is_joined() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def other_rank() -> int | None:
    """The rank of this process, where another one records for it; else None."""
    return (dist.get_rank() or None) if is_joined() else None


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether it is a ``DTensor``, of which each rank holds a part."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ranks hold different parts of it."""
    return is_distributed(tensor) and not all(p.is_replicate() for p in tensor.placements)


def _averaged(module: torch.nn.Module) -> float:
    for child in module.modules():
        if isinstance(child, DistributedDataParallel):
            return float(dist.get_world_size(child.process_group))
        state = getattr(child, "_get_fsdp_state", None)
        group = state()._fsdp_param_group if state is not None else None
        if group is not None:
            return float(group.gradient_divide_factor or group.mesh_info.mesh.size())
    return 1.0
