"""Trainings of tensor parallel models that are compared with a reference; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.parallel_reference_trainings FOLDER TRAINING...

Each writes what rank 0 has measured to ``FOLDER/TRAINING.pt``, what ``tmm.explain`` says as step
-1, and as step -2 whether losses and parameters of all ranks are bitwise those without tmm.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import tmm
from tests.decoder import decoder, local
from tests.mesh_trainings import FULL, Case, batches, by_blocks, in_sequence, world
from tests.rank_trainings import BACKEND, Metrics, main
from tests.sharded_reference_trainings import Net, net, other_state, spec
from tests.sharded_reference_trainings import batches as floats

EXPLAINED, UNDISTURBED = -1, -2
ALIKE = r"first$|last$|again$|blocks\.\d+$|blocks\.\d+\.norm$|\[root"
"""Modules whose outputs all ranks hold alike, which nothing tells where inputs are plain."""

DIFFERENCES = (
    tmm.activation("rms"),
    tmm.activation_difference("relative_norm", "cosine", "rms", "absmax"),
)
ALL = (*DIFFERENCES, tmm.rcc(operands=True))


def net_in_parts() -> Net:
    """Both projections of each block are split; the second one's bias is whole, as its output."""
    model = net()
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, init_device_mesh("cpu", (dist.get_world_size(),)), plan)  # type: ignore[arg-type]
    return model


def of_net(model: nn.Module, called: nn.Module) -> Case:
    return Case(model, called, loss=lambda output, _: output.square().mean())


def train(
    case: Case,
    given: list[tuple[Tensor, Tensor]],
    measured: tmm.Spec | None,
    **options: Any,
) -> tuple[Metrics, list[Any]]:
    """The metrics of each step; losses, and the parameters of this rank in the end."""
    called, monitor = case.called, None
    if measured is not None:
        called = tmm.instrument(called, measured, **options)
        monitor = tmm.monitor(called)
    parameters = list(case.net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    metrics: Metrics = {}
    losses: list[Any] = []
    for step, (inputs, labels) in enumerate(given):
        if monitor is not None:
            monitor.begin_step(step)
        loss = case.loss(called(inputs), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(local(loss.detach()).clone())
        if monitor is not None:
            monitor.end_step()
            metrics[step] = monitor.get_step_metrics()
    if monitor is not None:
        found = tmm.explain(called)
        metrics[EXPLAINED] = {"unmeasured": found.unmeasured, "by_rank": dict(found.by_rank)}
        tmm.remove(called)
    return metrics, losses + [local(parameter).detach().clone() for parameter in parameters]


def floats_given() -> list[tuple[Tensor, Tensor]]:
    return [(batch, batch) for batch in floats()[:3]]


def other_decoder() -> dict[str, Tensor]:
    """The state of another decoder."""
    torch.manual_seed(7)
    state = decoder(FULL).state_dict()
    return {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in state.items()}


Given = Callable[[], list[tuple[Tensor, Tensor]]]


@cache
def unmeasured(build: Callable[..., Case], given: Given, *how: Any) -> list[Any]:
    """Losses and parameters without tmm, once for all that measure the same program."""
    torch._dynamo.reset()
    return train(build(*how), given(), None)[1]


def both(
    build: Callable[..., Case],
    given: Given,
    reference: Any,
    rules: tuple[tmm.Rule, ...],
    *how: Any,
    reads_on: int | None = None,
    **options: Any,
) -> Metrics:
    """Train without tmm and with it; that rank reads a value, which changes none."""
    plain = unmeasured(build, given, *how)
    torch._dynamo.reset()
    case = build(*how)
    if reads_on is not None:
        reading(case, reads_on)
    metrics, found = train(case, given(), spec(reference, *rules), **options)
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, all(map(torch.equal, plain, found)))
    return {**metrics, UNDISTURBED: {"ranks": everywhere}}


def case_of_blocks(compiles: bool) -> Case:
    model = net_in_parts()
    called: Any = torch.compile(model, backend=BACKEND) if compiles else model
    return of_net(model, called)


def blocks(*, compiles: bool, reference: Any = "init") -> Metrics:
    alike = {ALIKE: "replicate"}
    return both(case_of_blocks, floats_given, reference, ALL, compiles, placements=alike)


def saved(folder: Path) -> str:
    """A folder of torch.distributed.checkpoint with the state of another model."""
    name = str(folder / "other")
    checkpoint.save(other_state(), checkpoint_id=name)
    return name


def outside_of_graphs() -> Metrics:
    """Blocks that Dynamo leaves alone: all that their hooks do with DTensors is followed."""

    def build() -> Case:
        model = net_in_parts()
        for block in model.blocks:
            block.forward = torch.compiler.disable(block.forward)  # type: ignore[method-assign]
        return of_net(model, model)

    alike = {ALIKE: "replicate"}
    return both(build, floats_given, other_state(), DIFFERENCES, placements=alike)


def case_in_sequence(kind: str) -> Case:
    """Tensor and sequence parallel; compiled as a whole, block by block, or not at all."""
    model = in_sequence(decoder(FULL), world())
    called: Any = model
    if kind == "whole":
        called = torch.compile(model, backend=BACKEND)
    elif kind == "blocks":
        by_blocks(model)
    return Case(model, called)


def sequence(kind: str, rules: tuple[tmm.Rule, ...], reference: Any = "init") -> Metrics:
    return both(case_in_sequence, batches, reference, rules, kind)


def gathered_output() -> Metrics:
    """A module whose bias is split, and whose output is not."""

    def build() -> Case:
        model = net()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parallelize_module(model, mesh, {"first": ColwiseParallel(output_layouts=Replicate())})
        return of_net(model, model)

    return both(build, floats_given, "init", (tmm.rcc(modules="first$"),))


def reading(case: Case, rank: int) -> None:
    """One rank reads what the first layer gives."""

    def read(module: nn.Module, arguments: Any, output: Tensor) -> None:
        if dist.get_rank() == rank:
            output.sum().item()

    case.net.layers["0"].register_forward_hook(torch.compiler.disable(read))  # type: ignore[index, union-attr, operator]


def reads_on(rank: int) -> Metrics:
    """Between graphs, one rank reads values, which ends the comparison there and not elsewhere."""
    given = other_decoder(), DIFFERENCES
    return both(case_in_sequence, batches, *given, "blocks", reads_on=rank)


def refused() -> Metrics:
    """Why models are refused, and that they can be compared parameter by parameter."""
    errors = []
    asked = spec("init", *DIFFERENCES)
    some = tmm.Spec(tmm.activation_difference("rms"), reference="init", reference_samples=1)
    mesh = init_device_mesh("cpu", (1, dist.get_world_size()), mesh_dim_names=("data", "tp"))
    gathered = in_sequence(decoder(FULL), mesh["tp"])
    fully_shard(gathered, mesh=mesh["data"])
    given: list[tuple[nn.Module, tmm.Spec, dict[str, Any]]] = [
        (net_in_parts(), asked, {"distributed": False}),
        (net_in_parts(), some, {}),
        (gathered, asked, {}),
    ]
    for model, measured, options in given:
        try:
            tmm.instrument(model, measured, **options)
        except ValueError as error:
            errors.append(str(error))
    return {0: {"errors": errors}}


TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    "blocks": lambda _: blocks(compiles=True),
    "blocks_uncompiled": lambda _: blocks(compiles=False),
    "blocks_file": lambda folder: blocks(compiles=True, reference=saved(folder)),
    "outside_of_graphs": lambda _: outside_of_graphs(),
    "whole_sequence": lambda _: sequence("whole", DIFFERENCES),
    "sequence_by_blocks": lambda _: sequence("blocks", DIFFERENCES, other_decoder()),
    "sequence_uncompiled": lambda _: sequence("uncompiled", ALL),
    "sequence_uncompiled_other": lambda _: sequence("uncompiled", ALL, other_decoder()),
    "gathered_output": lambda _: gathered_output(),
    "reads_on_0": lambda _: reads_on(0),
    "reads_on_1": lambda _: reads_on(1),
    "refused": lambda _: refused(),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
