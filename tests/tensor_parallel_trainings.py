"""Small tensor parallel trainings, and the same ones on one process; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.tensor_parallel_trainings FOLDER TRAINING...

Each writes what rank 0 has measured to ``FOLDER/TRAINING.pt``, with what ``tmm.explain`` says about
rows per rank as step -1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional

import tmm
from tests.rank_trainings import BACKEND, Metrics, batches, evenly, main, train

HEADS, WIDTH, VOCABULARY = 4, 16, 24
EXPLAINED = -1
OF_BLOCKS = "eager"  # torch 2.13 cannot go back from aot_eager into a DTensor outside of the graph


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        # A bias of keys has no gradient but noise.
        self.key = nn.Linear(WIDTH, WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            layer(x).view(batch, length, -1, WIDTH // HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.out(heads.transpose(1, 2).reshape(batch, length, -1))
        return result


class Block(nn.Module):
    def __init__(self, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.second_norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, hidden)
        self.activation = nn.GELU()
        self.down = nn.Linear(hidden, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        result: Tensor = x + self.dropout(self.down(self.activation(self.up(self.second_norm(x)))))
        return result


class Net(nn.Module):
    """``side`` stays as it is, whatever else is parallel."""

    def __init__(self, hidden: int = 32, dropout: float = 0.0, blocks: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(hidden, dropout) for _ in range(blocks))
        self.side = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x.mul(9).long().abs() % VOCABULARY)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = hidden + torch.tanh(self.side(hidden))
        tmm.record("hidden", hidden, aggregate="mean")
        logits = self.head(self.norm(hidden))
        tmm.record("logits", logits, aggregate="mean")
        return logits.full_tensor() if isinstance(logits, DTensor) else logits


def model(**options: Any) -> Net:
    torch.manual_seed(0)
    return Net(**options)


def spec() -> tmm.Spec:
    return tmm.Spec(
        tmm.activation("mean", "std", "rms", "norm", "kurtosis", "absmax", "min", "histogram"),
        tmm.activation(largest=lambda x: x.abs().amax(-1), aggregate="max", modules=r".*norm|.*up"),
        tmm.activation_gradient("rms", "absmax"),
        tmm.attention("entropy", "max_logit", "rms"),
        tmm.attention("entropy", "max_logit", "std", heads="pooled"),
        tmm.gradient("norm", "std", "absmax"),
        tmm.parameter("rms", "norm", "max"),
        tmm.update("relative_norm"),
        tmm.optimizer_state("exp_avg_norm"),
        every=2,
    )


# Plans

ATTENTION = {
    "attention.query": ColwiseParallel(),
    "attention.key": ColwiseParallel(),
    "attention.value": ColwiseParallel(),
    "attention.out": RowwiseParallel(),
}
PLAIN = {**ATTENTION, "up": ColwiseParallel(), "down": RowwiseParallel()}
UNEVEN = {**ATTENTION, "up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel()}
SEQUENCE = {
    "norm": SequenceParallel(),
    "attention": PrepareModuleInput(
        input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
    ),
    **ATTENTION,
    "attention.out": RowwiseParallel(output_layouts=Shard(1)),
    "second_norm": SequenceParallel(),
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}


def parallel(
    net: Net, mesh: DeviceMesh, plan: Mapping[str, Any] = PLAIN, *, in_sequence: bool = False
) -> Net:
    for block in net.blocks:
        parallelize_module(block, mesh, dict(plan))
        if in_sequence:
            edges = {
                "input_layouts": (Replicate(),),
                "desired_input_layouts": (Shard(1),),
                "use_local_output": True,
            }
            parallelize_module(block, mesh, PrepareModuleInput(**edges))
            parallelize_module(
                block,
                mesh,
                PrepareModuleOutput(
                    output_layouts=(Shard(1),), desired_output_layouts=(Replicate(),)
                ),
            )
    ends = {
        "embedding": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate(), use_local_output=False),
    }
    parallelize_module(net, mesh, ends)
    return net


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),))


def same(batch: Tensor) -> list[Tensor]:
    return [batch]


def explained(called: nn.Module, net: nn.Module, share: Any = same, **options: Any) -> Metrics:
    kept: dict[str, str] = {}
    found = train(called, net, share, spec(), before_removal=lambda m: _explain(m, kept), **options)
    return {**found, EXPLAINED: kept}


def _explain(called: nn.Module, kept: dict[str, str]) -> None:
    explanation = tmm.explain(called)
    kept.update(explanation.by_rank)
    kept["text"] = str(explanation)
    kept["unmeasured"] = repr(explanation.unmeasured)


# The trainings


def alone(**options: Any) -> Metrics:
    net = model(**options)
    return train(torch.compile(net, backend=BACKEND), net, same, spec())


def whole(blocks: int = 1) -> Metrics:
    net = parallel(model(blocks=blocks), mesh())
    return explained(torch.compile(net, backend=BACKEND), net)


def with_dropout() -> Metrics:
    net = parallel(model(dropout=0.5, blocks=1), mesh())
    return explained(torch.compile(net, backend="eager"), net)


def uncompiled() -> Metrics:
    net = parallel(model(blocks=1), mesh())
    return explained(net, net)


def uneven(hidden: int) -> Metrics:
    net = parallel(model(hidden=hidden, blocks=1), mesh(), UNEVEN)
    return explained(torch.compile(net, backend="eager"), net)


def blocks(placements: dict[str, str] | None = None) -> Metrics:
    net = parallel(model(), mesh())
    for block in net.blocks:
        block.compile(backend=OF_BLOCKS)
    return explained(net, net, placements=placements)


def declared() -> Metrics:
    alike = r"embedding|side|norm|hidden|\[root module\]|blocks\.\d$"
    return blocks({alike: "replicate"})


def by_itself() -> Metrics:
    """Each rank alone, with its parts."""
    net = parallel(model(hidden=7), mesh(), UNEVEN)
    rules = (tmm.activation("norm", modules=r".*up|.*down"), tmm.parameter("norm"))
    called = tmm.instrument(net, tmm.Spec(*rules), distributed=False)
    with tmm.monitor(called).step(0):
        called(batches()[0])
        tmm.monitor(called).monitor_parameters()
    return {0: tmm.monitor(called).get_step_metrics()}


def sequence() -> Metrics:
    net = parallel(model(), mesh(), SEQUENCE, in_sequence=True)
    for block in net.blocks:
        block.compile(backend=OF_BLOCKS)
    return explained(net, net)


def two_dimensions(plan: Mapping[str, Any] = PLAIN) -> Metrics:
    """FSDP over the other dimension of the mesh."""
    both = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tp"))
    net = parallel(model(), both["tp"], plan)
    for part in net.blocks:
        part.compile(backend=OF_BLOCKS)
        fully_shard(part, mesh=both["data"])
    fully_shard(net, mesh=both["data"])
    count = both["data"].size()
    return explained(net, net, lambda batch: [evenly(count, batch)[both["data"].get_local_rank()]])


def losses(*, measured: bool, backend: str) -> list[float]:
    net = parallel(model(blocks=1), mesh())
    called = torch.compile(net, backend=backend)
    if measured:
        called = tmm.instrument(called, spec())
        tmm.monitor(called).watch(optimizer := torch.optim.AdamW(net.parameters(), lr=1e-3))
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    found = []
    for step, batch in enumerate(batches()):
        if measured:
            tmm.monitor(called).begin_step(step)
        loss = called(batch).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if measured:
            tmm.monitor(called).end_step()
        found.append(loss.item())
    if measured:
        tmm.remove(called)
    return found


def undisturbed(backend: str) -> Metrics:
    plain, measured = (losses(measured=measured, backend=backend) for measured in (False, True))
    return {0: {"plain": plain, "measured": measured}}


TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    "whole": lambda _: whole(),
    "whole_of_two_blocks": lambda _: whole(2),
    "with_dropout": lambda _: with_dropout(),
    "uncompiled": lambda _: uncompiled(),
    "uneven": lambda _: uneven(7),
    "empty": lambda _: uneven(5),  # the last of four ranks has nothing
    "blocks": lambda _: blocks(),
    "declared": lambda _: declared(),
    "by_itself": lambda _: by_itself(),
    "sequence": lambda _: sequence(),
    "two_dimensions": lambda _: two_dimensions(),
    "undisturbed": lambda _: undisturbed(BACKEND),
    "undisturbed_eager": lambda _: undisturbed("eager"),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
