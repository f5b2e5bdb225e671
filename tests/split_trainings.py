"""Faults and collectives of models that are split in several ways at once; started by torchrun.

    torchrun --nproc-per-node 2 -m tests.split_trainings FOLDER TRAINING...

A training is called ``<what>_<way>``. Of two ranks the last dimension of the mesh has both.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import tmm
from tests.mesh_trainings import CASES, EVERY, Case, batches
from tests.mesh_trainings import spec as mesh_spec
from tests.rank_trainings import Metrics, main

WAYS = {
    "tensor": "uncompiled",
    "blocks": "sequence",
    "replicas": "replicas_of_blocks",
    "shards": "sharded_and_parallel",
}
LAST_STEP, PATIENCE = 2, 8
"""The step that the last rank does not end, and the seconds that the training waits for it."""


# Faults


def failing(fail: Callable[[], None], folder: Path, name: str, way: str) -> Metrics:
    """Train until the last rank fails; each other one writes what it was told, and ends."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # by which torchrun ends them at once
    numbers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(numbers, os.getpid())
    case = CASES[WAYS[way]]()
    set_patience(PATIENCE)
    is_last = dist.get_rank() == dist.get_world_size() - 1
    error, caught = "", []
    begun = time.monotonic()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with tmm.start_run(name, root=folder, system_seconds=None) as run:
                train_into(run, case, fail if is_last else lambda: None)
    except RuntimeError as raised:
        error = str(raised)
    found = {"error": error, "seconds": time.monotonic() - begun}
    found["warnings"] = [str(item.message) for item in caught]
    torch.save(found, folder / f"{name}_{way}-{dist.get_rank()}.pt")
    if dist.get_rank() == 0:
        others = (folder / f"{name}_{way}-{rank}.pt" for rank in range(len(numbers) - 1))
        for path in others:
            while not path.exists():
                time.sleep(0.05)
        with suppress(ProcessLookupError):
            os.kill(numbers[-1], signal.SIGKILL)
    os._exit(0)


def set_patience(seconds: float) -> None:
    """How long the training's own collectives wait for others, in each of its groups."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def train_into(run: Any, case: Case, fail: Callable[[], None]) -> None:
    parameters = list(case.net.parameters())
    called = run.watch(case.called, tmm.Spec(tmm.activation("rms"), tmm.gradient("norm")))
    optimizer = torch.optim.SGD(parameters, lr=1e-2)
    for step, (tokens, labels) in enumerate(batches() * 2):
        if step == LAST_STEP:
            time.sleep(1)  # so that the rows of the step before are on their way
            fail()
        loss = case.loss(called(case.share(tokens)), case.share(labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.step()


def killed(folder: Path, way: str) -> Metrics:
    return failing(partial(os.kill, os.getpid(), signal.SIGKILL), folder, "killed", way)


def frozen(folder: Path, way: str) -> Metrics:
    return failing(partial(os.kill, os.getpid(), signal.SIGSTOP), folder, "frozen", way)


# Collectives


def collectives() -> dict[str, int]:
    """How many collectives and messages each process group has begun on this rank."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return {g.group_name: g._get_sequence_number_for_group() for g in groups}


def counted(way: str) -> Metrics:
    """Of each step: those of the training without tmm, with it, and of tmm's own group."""
    plain, _ = steps_of(CASES[WAYS[way]](), lambda called: None)
    torch._dynamo.reset()
    measured, own = steps_of(CASES[WAYS[way]](), instrumented)
    return {0: {"plain": plain, "measured": measured, "own": own, "every": EVERY}}


def instrumented(called: nn.Module) -> tmm.Monitor:
    return tmm.monitor(tmm.instrument(called, mesh_spec()))


def steps_of(
    case: Case, instrument: Callable[[nn.Module], tmm.Monitor | None]
) -> tuple[list[int], list[int]]:
    """Collectives of each step after the first two, which make ready."""
    before = set(collectives())
    monitor = instrument(case.called)
    ours = set(collectives()) - before
    parameters = list(case.net.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    if monitor is not None:
        monitor.watch(optimizer)
    of_training, of_tmm = [], []
    for step, (tokens, labels) in enumerate(batches() * 2):
        begun = collectives()
        if monitor is not None:
            monitor.begin_step(step)
        loss = case.loss(case.called(case.share(tokens)), case.share(labels))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.end_step()
            monitor.get_step_metrics()  # waits for it
        made = {name: count - begun.get(name, 0) for name, count in collectives().items()}
        of_training.append(sum(count for name, count in made.items() if name not in ours))
        of_tmm.append(sum(count for name, count in made.items() if name in ours))
    if monitor is not None:
        tmm.remove(case.called)
    return of_training[2:], of_tmm[2:]


TRAININGS: dict[str, Callable[[Path], Metrics]] = {}
for _way in WAYS:
    TRAININGS[f"killed_{_way}"] = partial(killed, way=_way)
    TRAININGS[f"frozen_{_way}"] = partial(frozen, way=_way)
    TRAININGS[f"counted_{_way}"] = lambda _, way=_way: counted(way)  # type: ignore[misc]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:], TRAININGS)
