"""Loops with Fabric on several processes, as litgpt has them; started by torchrun."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import tmm
from tests.rank_trainings import Metrics, batches, evenly, main

STEPS = 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def train(
    folder: Path,
    model: Any,
    optimizer: Any,
    backward: Callable[[Tensor], object],
    share: Callable[[Tensor], list[Tensor]],
) -> Metrics:
    spec = tmm.Spec(
        tmm.activation("rms"),
        tmm.gradient("norm"),
        tmm.update("relative_norm"),
        tmm.parameter("rms"),
    )
    with tmm.start_run("fabric", root=folder, system_seconds=None) as run:
        run.watch(model, spec, optimizer=optimizer)
        for batch in batches()[:STEPS]:
            backward(torch.stack([model(part).square().mean() for part in share(batch)]).mean())
            optimizer.step()
            optimizer.zero_grad()
            run.step()
    if not run.path.exists():
        return {}
    with tmm.open_run(run.path) as read:
        measured = [key for key in read.keys() if not key.startswith("system")]  # noqa: SIM118
        return {
            step: {key: value for key, value in read.at(step).items() if key in measured}
            for step in range(STEPS)
        }


def alone(folder: Path, count: int) -> Metrics:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return train(folder, model, optimizer, Tensor.backward, lambda batch: evenly(count, batch))


def own(batch: Tensor) -> list[Tensor]:
    return [evenly(dist.get_world_size(), batch)[dist.get_rank()]]


def ddp(folder: Path) -> Metrics:
    fabric = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    fabric.launch()
    model = net()
    wrapped = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
    return train(folder / "ddp", *wrapped, fabric.backward, own)


def _sharded(model: Any, mesh: Any) -> nn.Module:
    for part in (model[0], model[2], model):
        fully_shard(part, mesh=mesh["data_parallel"])
    return model  # type: ignore[no-any-return]


def fsdp(folder: Path) -> Metrics:
    size = dist.get_world_size()
    strategy = ModelParallelStrategy(
        parallelize_fn=_sharded, data_parallel_size=size, tensor_parallel_size=1
    )
    fabric = Fabric(accelerator="cpu", devices=size, strategy=strategy)
    fabric.launch()
    model = fabric.setup_module(net())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=1e-2))
    return train(folder / "fsdp", model, optimizer, fabric.backward, own)


TRAININGS: dict[str, Callable[[Path], Metrics]] = {"ddp": ddp, "fsdp": fsdp}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
