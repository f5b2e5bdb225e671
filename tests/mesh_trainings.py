"""A small decoder split over processes in every way, and on one process; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.mesh_trainings FOLDER TRAINING...

Each writes what rank 0 has measured to ``FOLDER/TRAINING.pt``, what ``tmm.explain`` says as step
-1, and as step -2 whether losses and parameters of all ranks are bitwise those without tmm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import tmm
from tests.decoder import Decoder, Shape, decoder, local
from tests.rank_trainings import Metrics, main

STEPS, BATCH, EVERY = 3, 4, 2
EXPLAINED, UNDISTURBED = -1, -2
BACKEND = "aot_eager"
FULL = Shape(key_heads=4)
PLAIN = Shape(key_heads=4, is_plain=True)

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def batches(shape: Shape = FULL) -> list[Batch]:
    """Tokens and labels of the whole batch of each step."""
    generator = torch.Generator().manual_seed(1)
    size = (BATCH, shape.length + 1)
    drawn = [torch.randint(shape.vocabulary, size, generator=generator) for _ in range(STEPS)]
    return [(tokens[:, :-1], tokens[:, 1:]) for tokens in drawn]


def spec() -> tmm.Spec:
    return tmm.Spec(
        tmm.activation("mean", "std", "rms", "norm", "kurtosis", "absmax", "min"),
        tmm.activation_gradient("rms", "absmax", "std"),
        tmm.attention("entropy", "max_logit", "sink_mass"),
        tmm.attention("entropy", "std", heads="pooled"),
        tmm.gradient("norm", "std", "absmax"),
        tmm.parameter("rms", "norm", "max"),
        tmm.update("relative_norm"),
        tmm.optimizer_state("exp_avg_norm"),
        every=EVERY,
    )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over the tokens that this rank has."""
    return functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


@dataclass(frozen=True)
class Case:
    """A training: what is trained, called, and given to this rank of each batch.

    The loss of the whole batch is the mean over ranks of ``of_all`` times the loss of each.
    """

    net: nn.Module
    called: nn.Module
    share: Callable[[Tensor], Tensor] = lambda whole: whole
    loss: Loss = cross_entropy
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    options: Mapping[str, Any] | None = None
    of_all: float = 1.0


@dataclass
class Trained:
    """What came of it; ``states`` are the parameters that this rank holds."""

    metrics: Metrics
    losses: list[float]
    states: list[Tensor]


def train(case: Case, shape: Shape = FULL, *, measured: bool) -> Trained:
    """Train, and measure each second step."""
    called, monitor = case.called, None
    metrics: Metrics = {}
    if measured:
        called = tmm.instrument(called, spec(), **(case.options or {}))
        monitor = tmm.monitor(called)
    # DistributedDataParallel with a mesh takes them out of the modules later.
    parameters = list(case.net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    if monitor is not None:
        monitor.watch(optimizer)
    losses = []
    for step, (tokens, labels) in enumerate(batches(shape)):
        if monitor is not None:
            monitor.begin_step(step)
        with case.around():
            loss = case.loss(called(case.share(tokens)), case.share(labels))
            if monitor is not None:
                monitor.log_scalar("loss", loss.detach() * case.of_all)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.end_step()
            if step % EVERY == 0:
                metrics[step] = monitor.get_step_metrics()
        losses.append(local(loss.detach()).item())
    if monitor is not None:
        explanation = tmm.explain(called)
        metrics[EXPLAINED] = dict(explanation.by_rank)
        metrics[EXPLAINED] |= {"text": str(explanation), "unmeasured": explanation.unmeasured}
        tmm.remove(called)
    states = [local(parameter).detach().clone() for parameter in parameters]
    assert states
    return Trained(metrics, losses, states)


def both(build: Callable[[], Case], shape: Shape = FULL) -> Metrics:
    """Train without tmm and with it."""
    plain = train(build(), shape, measured=False)
    torch._dynamo.reset()
    found = train(build(), shape, measured=True)
    same = plain.losses == found.losses
    same = same and all(map(torch.equal, plain.states, found.states))
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, same)
    return {**found.metrics, UNDISTURBED: {"ranks": everywhere}}


def alone(make: Callable[[], nn.Module] = lambda: decoder(FULL), **options: Any) -> Metrics:
    """On one process."""
    torch._dynamo.reset()
    net = make()
    called = torch.compile(net, backend=BACKEND)
    return train(Case(net, called, **options), measured=True).metrics  # type: ignore[arg-type]


# Ways of splitting


def block_plan() -> dict[str, Any]:
    return {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
        ),
        "attention.wq": ColwiseParallel(),
        "attention.wk": ColwiseParallel(),
        "attention.wv": ColwiseParallel(),
        "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        ),
        "feed_forward.w1": ColwiseParallel(),
        "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
        "feed_forward.w3": ColwiseParallel(),
    }


def in_sequence(net: Decoder, mesh: DeviceMesh, *, splits_loss: bool = False) -> Decoder:
    """Tensor parallel, with parts of the sequence in between; logits may stay in parts."""
    ends = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(
            input_layouts=Shard(1),
            output_layouts=Shard(-1) if splits_loss else Replicate(),
            use_local_output=not splits_loss,
        ),
    }
    parallelize_module(net, mesh, ends)
    for block in net.layers.values():
        parallelize_module(block, mesh, block_plan())
    return net


def plain_plan(**options: Any) -> dict[str, Any]:
    """Without parts of the sequence: what lies between is whole on each rank."""
    layers = {f"attention.{name}": ColwiseParallel(**options) for name in ("wq", "wk", "wv")}
    layers |= {f"feed_forward.{name}": ColwiseParallel(**options) for name in ("w1", "w3")}
    for name in ("attention.wo", "feed_forward.w2"):
        layers[name] = RowwiseParallel(**options)
    return layers


def replicated(net: Decoder, mesh: DeviceMesh) -> Decoder:
    parallelize_module(
        net,
        mesh,
        {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
            "output": ColwiseParallel(output_layouts=Replicate()),
        },
    )
    for block in net.layers.values():
        parallelize_module(block, mesh, plain_plan())
    return net


def distributed_everywhere(net: Decoder, mesh: DeviceMesh) -> Decoder:
    """All tensors between modules are DTensors, and what the model gives back is one."""
    whole = PrepareModuleInput(
        input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),), use_local_output=False
    )
    parallelize_module(net, mesh, whole)
    ends = {"output": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)}
    parallelize_module(net, mesh, ends)
    for block in net.layers.values():
        parallelize_module(block, mesh, plain_plan(use_local_output=False))
    distribute_module(net, mesh)  # what is left is alike on all ranks
    return net


def by_blocks(net: Decoder, backend: str = BACKEND) -> Decoder:
    for block in net.layers.values():
        block.compile(backend=backend, fullgraph=True)
    return net


def sharded(net: Decoder, mesh: DeviceMesh) -> Decoder:
    for block in net.layers.values():
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net


def world() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))


def two_dimensions(*names: str) -> DeviceMesh:
    """Of two ranks in the last dimension."""
    shape = (dist.get_world_size() // 2, 2)
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def part_of(mesh: DeviceMesh, whole: Tensor) -> Tensor:
    """The items of a batch that this rank has, of which ranks of other meshes have others."""
    return whole.chunk(mesh.size())[mesh.get_local_rank()]


# The trainings


def sequence(backend: str = BACKEND) -> Case:
    net = by_blocks(in_sequence(decoder(FULL), world()), backend)
    return Case(net, net)


def whole_sequence() -> Case:
    net = in_sequence(decoder(FULL), world())
    return Case(net, torch.compile(net, backend=BACKEND))  # type: ignore[arg-type]


def uncompiled() -> Case:
    net = in_sequence(decoder(FULL), world())
    return Case(net, net)


def loss_in_parts() -> Case:
    net = by_blocks(in_sequence(decoder(FULL), world(), splits_loss=True))
    return Case(net, net, around=loss_parallel)


def whole_loss_in_parts() -> Case:
    net = in_sequence(decoder(FULL), world(), splits_loss=True)
    called = torch.compile(net, backend=BACKEND)
    return Case(net, called, around=loss_parallel)  # type: ignore[arg-type]


def plain(*, whole: bool) -> Case:
    net = replicated(decoder(FULL), world())
    called = torch.compile(net, backend=BACKEND) if whole else by_blocks(net)
    return Case(net, called)  # type: ignore[arg-type]


def loss_of_whole(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits that are a DTensor."""
    assert isinstance(logits, DTensor)
    return cross_entropy(logits.full_tensor(), labels)


def dtensors(backend: str | None) -> Case:
    net = distributed_everywhere(decoder(PLAIN), world())
    called = net if backend is None else torch.compile(net, backend=backend)
    return Case(net, called, loss=loss_of_whole)  # type: ignore[arg-type]


class Layers(nn.Module):
    """Without attention; what is between the layers is whole, and its gradient is a sum."""

    def __init__(self) -> None:
        super().__init__()
        width, hidden = FULL.width, FULL.hidden
        self.enter = nn.Linear(FULL.vocabulary, width)
        self.norm, self.up = nn.RMSNorm(width), nn.Linear(width, hidden)
        self.gate, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.output = nn.Linear(width, FULL.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        codes = functional.one_hot(tokens, FULL.vocabulary).float()
        if isinstance(self.enter.weight, DTensor):
            codes = DTensor.from_local(codes, self.enter.weight.device_mesh, [Replicate()])
        x = self.enter(codes)
        normed = self.norm(x)
        x = x + self.down(functional.silu(self.gate(normed)) * self.up(normed))
        logits: Tensor = self.output(x)
        return logits


def layers() -> Layers:
    torch.manual_seed(0)
    return Layers()


def dtensors_of_layers() -> Case:
    net, mesh = layers(), world()
    plan: dict[str, Any] = {
        name: ColwiseParallel(use_local_output=False, output_layouts=Shard(-1))
        for name in ("up", "gate", "output")
    }
    plan["down"] = RowwiseParallel(use_local_output=False)
    parallelize_module(net, mesh, plan)
    distribute_module(net, mesh)
    called = torch.compile(net, backend=BACKEND, fullgraph=True)
    return Case(net, called, loss=loss_of_whole)  # type: ignore[arg-type]


def sharded_and_parallel() -> Case:
    """FSDP2 over the first dimension, tensor and sequence parallel over the second."""
    mesh = two_dimensions("data", "tp")
    net = by_blocks(in_sequence(decoder(FULL), mesh["tp"]))
    sharded(net, mesh["data"])
    return Case(net, net, partial(part_of, mesh["data"]))


def hybrid(shape: tuple[int, int]) -> Case:
    """FSDP2 over a mesh of two dimensions: replicas of shards."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    net = sharded(by_blocks(decoder(FULL)), mesh)
    everything = init_device_mesh("cpu", (dist.get_world_size(),))
    return Case(net, net, partial(part_of, everything))


def replicas_of_parallel(wrap: Callable[[Decoder], nn.Module]) -> Case:
    """DistributedDataParallel over the first dimension, tensor parallel over the second."""
    mesh = two_dimensions("data", "tp")
    net = in_sequence(decoder(FULL), mesh["tp"])
    called = DistributedDataParallel(wrap(net), device_mesh=mesh["data"])
    return Case(net, called, partial(part_of, mesh["data"]))


CASES: dict[str, Callable[[], Case]] = {
    "sequence": sequence,
    "whole_sequence": whole_sequence,
    "uncompiled": uncompiled,
    "loss_in_parts": loss_in_parts,
    "whole_loss_in_parts": whole_loss_in_parts,
    "plain_blocks": partial(plain, whole=False),
    "plain_whole": partial(plain, whole=True),
    "dtensors_of_layers": dtensors_of_layers,
    "dtensors_eager": partial(dtensors, "eager"),
    "dtensors_uncompiled": partial(dtensors, None),
    "sharded_and_parallel": sharded_and_parallel,
    "hybrid_replicas": partial(hybrid, (2, 1)),
    "hybrid_shards": partial(hybrid, (1, 2)),
    "hybrid_both": partial(hybrid, (2, 2)),
    "replicas_uncompiled": partial(replicas_of_parallel, lambda net: net),
    "replicas_of_blocks": partial(replicas_of_parallel, by_blocks),
}

TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    name: (lambda _, build=build: both(build))
    for name, build in CASES.items()  # type: ignore[misc]
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
