"""Trainings whose replicas agree, or do not; started by torchrun.

torchrun --nproc-per-node 2 -m tests.agreement_trainings FOLDER TRAINING...
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import tmm
from tests.rank_trainings import Metrics, main
from tests.sharded_reference_trainings import Collectives

STEPS = 7


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 10), nn.Linear(10, 3))


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def spoil(parameter: Tensor) -> None:
    """Another last bit of one element."""
    with torch.no_grad():
        part = local(parameter).view(-1)
        part[0] = torch.nextafter(part[0], torch.tensor(9.0))


def train(
    model: nn.Module, folder: Path, spoiled: Callable[[int], bool], **options: Any
) -> dict[str, Any]:
    """A training of which one parameter is spoiled before the fourth step of some ranks."""
    run = tmm.start_run("agreement", root=folder, system_seconds=None)
    counts: list[int] = []
    with warnings.catch_warnings(record=True) as caught, run:
        warnings.simplefilter("always")
        spec = tmm.Spec(tmm.activation("rms"), **{"every": 3, "replicas_agree": 2, **options})
        called = run.watch(model, spec)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        error = ""
        for step in range(STEPS):
            if step == 3 and spoiled(dist.get_rank()):
                spoil(dict(model.named_parameters())[names(model)[2]])
            with Collectives() as mode:
                called(torch.randn(4, 6)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                try:
                    run.step()
                except tmm.AlertError as alert:
                    error = str(alert)
                    break
            counts.append(mode.count)
    found: dict[str, Any] = {
        "counts": counts,
        "warnings": [str(item.message) for item in caught if "replicas" in str(item.message)],
        "error": error,
    }
    if dist.get_rank() == 0:
        with tmm.open_run(run.path) as read:
            found["values"] = dict(
                zip(*map(list, read.series("step/replicas_differing")), strict=True)
            )
            found["keys"] = read.keys("step/replicas_differing/")
            found["events"] = [event for event in read.events if event.kind == "replicas"]
            found["stories"] = read.findings()
    return found


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def ddp(folder: Path) -> Metrics:
    """All agree; one rank differs; the same as an exception."""
    return {
        0: train(DistributedDataParallel(net()), folder, lambda rank: False),
        1: train(DistributedDataParallel(net()), folder, lambda rank: rank == 1),
        2: train(
            DistributedDataParallel(net()),
            folder,
            lambda rank: rank == 1,
            alerts=True,
            on_alert=lambda anomalies: None,
        ),
    }


def hybrid(folder: Path) -> Metrics:
    """Each part of a parameter has a replica."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("r", "s"))
    found: Metrics = {}
    for number, wrong in enumerate((-1, dist.get_world_size() - 1)):
        model = net()
        fully_shard(model[2], mesh=mesh)
        fully_shard(model, mesh=mesh)
        found[number] = train(model, folder, lambda rank, wrong=wrong: rank == wrong)  # type: ignore[misc]
    return found


def alone(folder: Path) -> Metrics:
    """Calls of the function."""
    found: dict[str, Any] = {}
    model = net()
    with Collectives() as mode:
        found["equal"] = tmm.replicas_agree(model)
    found["collectives"] = mode.count
    for name, dtype in (
        ("half", torch.bfloat16),
        ("double", torch.float64),
        ("c", torch.complex64),
    ):
        model = net().to(dtype)
        found[f"{name} equal"] = tmm.replicas_agree(model)
        if dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                model[3].weight[1, 2] *= -1  # one bit
        found[name] = tmm.replicas_agree(model)
    model = net()
    if dist.get_rank() == 0:
        with torch.no_grad():  # the same elements in another order
            model[2].weight.copy_(model[2].weight.flip(0))
            model[3].bias[0] = torch.nan
    found["order"] = tmm.replicas_agree(model)
    sharded = net()
    fully_shard(sharded)
    if dist.get_rank() == 1:
        spoil(sharded[0].weight)
    found["sharded"] = tmm.replicas_agree(sharded)
    kept = net()
    fully_shard(kept, reshard_after_forward=False)
    with torch.no_grad():
        kept(torch.ones(2, 6))
    found["gathered"] = tmm.replicas_agree(kept)
    # Ranks with other layers, as in a pipeline.
    model = nn.ModuleDict({"all": nn.Linear(2, 2), f"of {dist.get_rank()}": nn.Linear(3, 3)})  # type: ignore[assignment]
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    if dist.get_rank() == 1:
        spoil(model["all"].bias)  # type: ignore[index]
    found["others"] = tmm.replicas_agree(model)
    return {0: found}


TRAININGS: dict[str, Callable[[Path], Metrics]] = {"ddp": ddp, "hybrid": hybrid, "alone": alone}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
