"""What it costs that every row is one of all ranks, and what it would cost on many.

    python -m benchmarks.distributed [--rounds 30] [--quick] [--save]

1. Joining: the time from the end of a monitored step until its rows are those of all ranks, and the
   part of it that the training thread spends, for 1, 2 and 4 processes and 100 to 4,000 rows.
2. Training: a step of ``DistributedDataParallel`` on 2 processes with and without tmm, in turns.
3. A model of the time for more ranks, fitted to 2 ranks and checked against 1 and 4.

Processes talk over gloo on one machine, in one thread each; more processes than cores wait for one
another.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

import tmm
from benchmarks.report import save_report
from benchmarks.timing import environment, interleave
from benchmarks.workloads import FIVE_METRICS, GPT_SMALL, monitored_step, training_step
from tmm.metrics import builtin_reductions
from tmm.runtime.cross_rank import Contribution, CrossRank
from tmm.runtime.joined_rows import RowKind
from tmm.runtime.process_group import ProcessGroup

ROWS = (100, 1000, 4000)
WORLDS = (1, 2, 4)
MANY = (8, 64, 512, 4096)
(REDUCTION,) = builtin_reductions(FIVE_METRICS, is_complex=False)
KIND = RowKind.of(REDUCTION)
EXTREMES, MOMENTS = 1, 1  # of the columns of KIND: absmax, moment2


@dataclass(frozen=True)
class Joining:
    """Of one number of processes and rows: seconds of a step, and those of the training thread."""

    ranks: int
    rows: int
    seconds: float
    low: float
    high: float
    training_seconds: float


@dataclass(frozen=True)
class CostModel:
    """Time to join a step: that of one rank, and per collective a latency and bytes on the way.

    An all-reduce over n ranks in a ring takes 2 (n - 1) messages of a part of 1/n one after the
    other, in a tree 2 log2(n) of the whole. ``latency`` is that of a message in seconds,
    ``bandwidth`` in bytes a second, ``base`` the seconds per row that no communication takes.
    Assumes that ranks come at the same time, and one network for all of them.
    """

    latency: float
    bandwidth: float
    base: float

    def seconds(self, ranks: int, rows: int, *, tree: bool) -> float:
        """Time to join a step of ``rows`` rows of five metrics."""
        total = self.base * rows
        for size in sizes_of(rows):
            messages = 2 * math.log2(ranks) if tree else 2 * (ranks - 1)
            length = size if tree else size / ranks
            total += messages * (self.latency + length / self.bandwidth)
        return total


def sizes_of(rows: int) -> tuple[int, int, int]:
    """Bytes of the three collectives of a step: the maximum, and both sums."""
    summed = len(KIND.columns) - MOMENTS
    return 8 * (5 + rows * EXTREMES), 8 * rows * summed, 8 * rows * MOMENTS


@dataclass(frozen=True)
class Step:
    """A step with rows of made-up tensors."""

    step: int
    sites: tuple[str, ...]

    def contribution(self) -> Contribution:
        """The rows."""
        return Contribution({KIND: (self.sites, np.ones((len(self.sites), KIND.width)))})


def joining(ranks: int, rounds: int) -> list[Joining]:
    """Time steps of each number of rows; all ranks call this."""
    found = []
    for rows in ROWS:
        cross = CrossRank(ProcessGroup())
        sites = tuple(f"activation/{index}" for index in range(rows))
        seconds, own = [], []
        for step in range(rounds + 5):
            dist.barrier()
            started = time.perf_counter()
            turn = cross.submit(Step(step, sites))
            own.append(time.perf_counter() - started)
            turn.wait()
            seconds.append(time.perf_counter() - started)
        cross.close()
        ordered = sorted(seconds[5:])
        quarter = len(ordered) // 4
        found.append(
            Joining(
                *(ranks, rows, statistics.median(ordered), ordered[quarter], ordered[-1 - quarter]),
                statistics.median(own[5:]),
            )
        )
    return found


def messages(rounds: int) -> dict[int, float]:
    """Seconds of an all-reduce of that many bytes, on the ranks that call this."""
    group, found = ProcessGroup(), {}
    for size in (8, 8 * 1024, 8 * 65536):
        values, seconds = np.ones(size // 8), []
        for _ in range(rounds + 5):
            dist.barrier()
            started = time.perf_counter()
            group.total(values)
            seconds.append(time.perf_counter() - started)
        found[size] = statistics.median(seconds[5:])
    group.close()
    return found


def training(rounds: int) -> dict[str, Any]:
    """Steps of one model with and without tmm, each in a wrapper of its own."""
    steps: dict[str, Callable[[], None]] = {}
    for name in ("plain", "tmm, not monitored", "tmm, monitored"):
        module = GPT_SMALL.model()
        wrapped = DistributedDataParallel(torch.compile(module))
        step = training_step(module, wrapped, GPT_SMALL.tokens())
        if name != "plain":
            watched = tmm.instrument(wrapped, tmm.Spec(tmm.activation(*FIVE_METRICS)))
            step = training_step(module, watched, GPT_SMALL.tokens())
            if name == "tmm, monitored":
                step = monitored_step(watched, step)
        steps[name] = step
    timings = interleave(steps, rounds)
    return {
        name: {"ms": timing.median * 1e3, "ratio": timing.ratio, "interval": timing.interval}
        for name, timing in timings.items()
    }


def work(rank: int, ranks: int, folder: str, rounds: int, with_training: bool) -> None:
    """What one process does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store-{ranks}", rank=rank, world_size=ranks
    )
    found = {
        "joining": [asdict(line) for line in joining(ranks, rounds)],
        "messages": messages(rounds),
        "training": training(max(5, rounds // 2)) if with_training else {},
    }
    if rank == 0:
        torch.save(found, Path(folder, f"{ranks}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def fitted(one: list[Joining], two: Mapping[int, float]) -> CostModel:
    """The model from the steps of one rank, and from messages between two."""
    small, large = min(two), max(two)
    latency = two[small] / 2
    # Two ranks send each half, twice.
    bandwidth = (large - small) / max(two[large] - two[small], 1e-9)
    last = one[-1]
    return CostModel(latency, bandwidth, last.seconds / last.rows)


def main(
    rounds: Annotated[int, typer.Option(help="Steps of each kind.")] = 60,
    quick: Annotated[bool, typer.Option(help="Few rounds, no training.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure what joining the rows of all ranks costs."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rounds = 10 if quick else rounds
    results: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for ranks in WORLDS:
            arguments = (ranks, folder, rounds, ranks == 2 and not quick)
            multiprocessing.spawn(work, arguments, nprocs=ranks)
            results[ranks] = torch.load(Path(folder, f"{ranks}.pt"), weights_only=False)
    lines = [Joining(**line) for ranks in WORLDS for line in results[ranks]["joining"]]
    model = fitted([line for line in lines if line.ranks == 1], results[2]["messages"])
    table = Table("processes", "rows", "ms", "quartiles", "training thread, us", "model, ms")
    for line in lines:
        table.add_row(
            *(str(line.ranks), str(line.rows), f"{line.seconds * 1e3:.2f}"),
            f"{line.low * 1e3:.2f} to {line.high * 1e3:.2f}",
            f"{line.training_seconds * 1e6:.0f}",
            f"{model.seconds(line.ranks, line.rows, tree=False) * 1e3:.2f}",
        )
    predicted = {
        f"{ranks} ranks, {rows} rows": {
            "ring_ms": model.seconds(ranks, rows, tree=False) * 1e3,
            "tree_ms": model.seconds(ranks, rows, tree=True) * 1e3,
            "bytes": sum(sizes_of(rows)),
        }
        for ranks in MANY
        for rows in ROWS
    }
    console = Console(width=100)
    console.print(table)
    more = Table(
        "ranks and rows", "ring, ms", "tree, ms", "bytes of a rank", title="as the model says"
    )
    for name, cost in predicted.items():
        more.add_row(name, f"{cost['ring_ms']:.1f}", f"{cost['tree_ms']:.1f}", f"{cost['bytes']:,}")
    console.print(more)
    for name, timing in results[2]["training"].items():
        low, high = timing["interval"]
        console.print(
            f"{name}: {timing['ms']:.1f} ms, {timing['ratio']:.4f} ({low:.4f} to {high:.4f})"
        )
    if save:
        report = {
            "rounds": rounds,
            "environment": environment(),
            "lines": [asdict(line) for line in lines],
            "messages": {ranks: results[ranks]["messages"] for ranks in WORLDS},
            "training": results[2]["training"],
            "model": asdict(model),
            "predicted": predicted,
        }
        save_report("distributed", "cpu", report)


if __name__ == "__main__":
    typer.run(main)
