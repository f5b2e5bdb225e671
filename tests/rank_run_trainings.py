"""Trainings whose ranks each record their own rows into one run; started by torchrun.

torchrun --nproc-per-node 2 -m tests.rank_run_trainings FOLDER TRAINING...
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import tmm
from tests.rank_trainings import Metrics, batches, evenly, main, own

STEPS = 5


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))


def spec() -> tmm.Spec:
    return tmm.Spec(
        tmm.activation("rms", "histogram"), tmm.gradient("norm"), tmm.parameter("rms"), every=2
    )


def train(
    path: Path, steps: range = range(STEPS), spoils: bool = False, **options: Any
) -> dict[int, dict[str, Any]]:
    """What this rank has measured."""
    model = net()
    called = tmm.instrument(model, spec(), run=path, per_rank=True, **options)
    monitor = tmm.monitor(called)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor.watch(optimizer)
    found = {}
    for step in steps:
        with monitor.step(step):
            if dist.get_rank() == 1 and step == 4 and spoils:
                with torch.no_grad():
                    model[2].weight.mul_(3)
                time.sleep(0.2)
            loss = called(own(evenly, batches()[step])[0]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.log_scalar("loss", loss)
        if step % 2 == 0:
            found[step] = monitor.get_step_metrics()
    tmm.remove(called)
    return found


def of_all(found: object) -> list[Any]:
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, found)
    return everywhere


def recorded(folder: Path) -> Metrics:
    return {0: {"measured": of_all(train(folder / "run", spoils=True))}}


def taken(folder: Path) -> Metrics:
    """Two runs at one path; all ranks go to the same one."""
    train(folder / "taken")
    train(folder / "taken", range(2))
    return {}


def resumed(folder: Path) -> Metrics:
    """The run goes on from step 2."""
    train(folder / "resumed")
    train(folder / "resumed", range(2, 5), resume=True)
    return {}


def refused(folder: Path) -> Metrics:
    """Rank 0 cannot record; all are told."""
    (folder / "file").write_text("no folder") if dist.get_rank() == 0 else None
    dist.barrier()
    text = ""
    try:
        train(folder / "file" / "run")
    except (OSError, RuntimeError) as error:
        text = str(error)
    return {0: {"errors": of_all(text)}}


def killed(folder: Path) -> Metrics:
    """Rank 1 dies after three steps."""
    model = net()
    called = tmm.instrument(model, spec(), run=folder / "killed", per_rank=True)
    for step in range(STEPS):
        with tmm.monitor(called).step(step):
            called(batches()[step])
        dist.barrier()
        if step == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), 9)
    time.sleep(1)
    return {}


TRAININGS: dict[str, Callable[[Path], Metrics]] = {
    "recorded": recorded,
    "taken": taken,
    "resumed": resumed,
    "refused": refused,
    "killed": killed,
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
