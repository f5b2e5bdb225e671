"""A decoder split as torchtitan splits one, and on one process; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.titan_trainings FOLDER TRAINING...

What is done to the model, and in which order, is what torchtitan does: tensor and sequence
parallel, expert parallel, activation checkpointing, each block compiled as a whole, ``fully_shard``
without a division of gradients, a loss that is a sum over the tokens of all ranks, in chunks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from tests.decoder import Decoder, MixtureOfExperts, Shape, decoder
from tests.mesh_trainings import BACKEND, FULL, Case, alone, both, in_sequence, part_of
from tests.rank_trainings import Metrics, main

CHUNKS = 2
WITH_EXPERTS = replace(FULL, experts=4)

Checkpointing = Literal["none", "full", "selective"]


@dataclass(frozen=True)
class Degrees:
    """Over how many processes what is split; ``experts`` are some of those with shards."""

    shards: int = 1
    tensor: int = 1
    experts: int = 1


# The loss


class ChunkedLoss:
    """Calls the head, and goes back through it, for some of the positions at a time.

    ``tokens`` is how many tokens all processes have, of which this one has some.
    """

    def __init__(self, net: Decoder, tokens: int) -> None:
        self.net, self.tokens = net, tokens
        net.skips_head = True

    def __call__(self, hidden: Tensor, labels: Tensor) -> Tensor:
        head = self.net.output
        given = hidden.detach()
        is_sharded = isinstance(head, FSDPModule)
        if is_sharded:
            head.set_reshard_after_forward(False)
            head.set_reshard_after_backward(False)
        loss, parts = torch.zeros(()), []
        for place, chunk in enumerate(given.chunk(CHUNKS, dim=1)):
            if is_sharded and place == CHUNKS - 1:
                head.set_reshard_after_backward(True)
            part = chunk.detach().requires_grad_()
            logits = head(part).flatten(0, 1).float()
            wanted = labels.chunk(CHUNKS, dim=1)[place].flatten()
            of_chunk = functional.cross_entropy(logits, wanted, reduction="sum") / self.tokens
            of_chunk.backward()
            assert part.grad is not None
            parts.append(part.grad)
            loss = loss + of_chunk.detach()
        return _Back.apply(hidden, torch.cat(parts, dim=1), loss)  # type: ignore[no-any-return]


class _Back(torch.autograd.Function):
    """A loss whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *of_loss: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * of_loss[0], None, None


def sum_of_tokens(tokens: int, logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.flatten(0, 1).float()
    return functional.cross_entropy(logits, labels.flatten(), reduction="sum") / tokens


# What is done to the model


def checkpointed(net: Decoder, how: Checkpointing) -> None:
    if how == "none":
        return
    for name, block in net.layers.named_children():
        options: dict[str, Any] = {"preserve_rng_state": False}
        if how == "selective":
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        net.layers[name] = checkpoint_wrapper(block, **options)


def _policy(ctx: Any, operation: Any, *_: object, **__: object) -> CheckpointPolicy:
    kept = (torch.ops.aten.mm.default, torch.ops._c10d_functional.reduce_scatter_tensor.default)
    is_kept = operation in kept
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


def experts_in(net: nn.Module) -> list[MixtureOfExperts]:
    return [module for module in net.modules() if isinstance(module, MixtureOfExperts)]


def split_experts(net: Decoder, mesh: DeviceMesh) -> None:
    for mixture in experts_in(net):
        mixture.group = mesh.get_group()
        for name, weight in mixture.experts.named_parameters():
            placed = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
            setattr(mixture.experts, name, placed)


def sharded(
    net: Decoder, mesh: DeviceMesh, of_experts: DeviceMesh | None, *, is_together: bool = False
) -> None:
    """``is_together`` shards a block and the experts inside by one call, over a mesh each."""
    for block in net.layers.values():
        if is_together and of_experts is not None:
            fully_shard(
                block, mesh=mesh, shard_placement_fn=each_over_its_own(block, mesh, of_experts)
            )
            continue
        for mixture in experts_in(block):
            if of_experts is not None:
                fully_shard(mixture.experts, mesh=of_experts)
        fully_shard(block, mesh=mesh)
    fully_shard(net.tok_embeddings, mesh=mesh)
    fully_shard([net.norm, net.output], mesh=mesh)
    fully_shard(net, mesh=mesh)
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def each_over_its_own(
    block: nn.Module, mesh: DeviceMesh, of_experts: DeviceMesh
) -> Callable[[nn.Parameter], Any]:
    """How torch 2.13 is told over which mesh it is to shard a parameter."""
    from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp

    experts = {p for mixture in experts_in(block) for p in mixture.experts.parameters()}
    of_all, of_these = (fsdp.FSDPMeshInfo(m, shard_mesh_dim=0) for m in (mesh, of_experts))

    def place(parameter: nn.Parameter) -> Any:
        return fsdp.ShardPlacementResult(Shard(0), of_these if parameter in experts else of_all)

    return place


def parallelized(
    shape: Shape = FULL,
    degrees: Degrees | None = None,
    *,
    checkpointing: Checkpointing = "none",
    is_compiled: bool = True,
    has_chunks: bool = False,
    is_together: bool = False,
    backend: str = BACKEND,
) -> Case:
    degrees = degrees or Degrees(dist.get_world_size())
    net = decoder(shape)
    mesh = init_device_mesh(
        "cpu", (degrees.shards, degrees.tensor), mesh_dim_names=("shards", "tensor")
    )
    data, of_experts = mesh["shards"], None
    if degrees.tensor > 1:
        in_sequence(net, mesh["tensor"])
    if degrees.experts > 1:
        both_kinds = init_device_mesh(
            "cpu",
            (degrees.shards // degrees.experts, degrees.experts),
            mesh_dim_names=("rest", "experts"),
        )
        split_experts(net, both_kinds["experts"])
        of_experts = both_kinds["rest"]
    checkpointed(net, checkpointing)
    if is_compiled:
        for block in net.layers.values():
            block.compile(backend=backend, fullgraph=not experts_in(block))
    sharded(net, data, of_experts, is_together=is_together)
    tokens = 4 * shape.length
    loss = ChunkedLoss(net, tokens) if has_chunks else partial(sum_of_tokens, tokens)
    return Case(net, net, partial(part_of, data), loss, of_all=float(data.size()))


def one_process(shape: Shape = FULL, *, has_chunks: bool = False) -> Metrics:
    """What the same training measures on one process."""
    loss: dict[str, Any] = {"loss": partial(sum_of_tokens, 4 * shape.length)}
    net = decoder(shape)
    if has_chunks:
        loss["loss"] = ChunkedLoss(net, 4 * shape.length)
    return alone(lambda: net, **loss)


CASES: dict[str, Callable[[], Case]] = {
    "shards": parallelized,
    "full_checkpoints": partial(parallelized, checkpointing="full"),
    "selective_checkpoints": partial(parallelized, checkpointing="selective"),
    "chunks": partial(parallelized, has_chunks=True),
    "chunks_uncompiled": partial(parallelized, has_chunks=True, is_compiled=False),
    "tensor": partial(parallelized, degrees=Degrees(1, 2)),
    "experts": partial(parallelized, WITH_EXPERTS, Degrees(2, 1, 2)),
    "experts_together": partial(parallelized, WITH_EXPERTS, Degrees(2, 1, 2), is_together=True),
    "experts_uncompiled": partial(parallelized, WITH_EXPERTS, Degrees(2, 1, 2), is_compiled=False),
    # torch 2.13 cannot save a DTensor's mesh for AOTAutograd to repeat a part of a forward pass.
    "all_of_two": partial(
        parallelized,
        degrees=Degrees(1, 2),
        checkpointing="full",
        has_chunks=True,
        backend="eager",
    ),
    "all_of_four": partial(
        parallelized,
        degrees=Degrees(2, 2),
        checkpointing="selective",
        has_chunks=True,
        backend="eager",
    ),
    "experts_of_four": partial(parallelized, WITH_EXPERTS, Degrees(4, 1, 2), has_chunks=True),
}

TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    name: (lambda _, build=build: both(build))  # type: ignore[misc]
    for name, build in CASES.items()
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
