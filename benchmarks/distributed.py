"""What it costs that every row is one of all ranks, and what it would cost on many.

    python -m benchmarks.distributed [--rounds 30] [--quick] [--save]

1. Joining: the time from the end of a monitored step until its rows are those of all ranks, and
   the part of it that the training thread spends, for 1, 2 and 4 processes and 100 to 4,000 rows.
   With 4 also where ranks have the rows of a stage each, as in a pipeline, or two have those of one
   of two stages, as on a mesh of two dimensions.
2. Training: a step of ``DistributedDataParallel`` on 2 processes with and without tmm, in turns.
3. A model of the time for more ranks, from the steps of one rank and messages between two, checked
   against 1, 2 and 4. Names are told once, when the model is instrumented and in the first step:
   each once for all ranks that have the same.

Processes talk over gloo on one machine, in one thread each.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
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
from tmm.core.metrics import builtin_reductions
from tmm.runtime.ranks.gloo import ProcessGroup
from tmm.runtime.ranks.joined_rows import on_the_wire
from tmm.runtime.ranks.protocol import CrossRank, Exchange

ROWS = (100, 1000, 4000)
WORLDS = (1, 2, 4)
MANY = (8, 64, 512, 4096)
STAGES = {"data": 1, "two stages": 2, "a stage each": 4}
"""In how many stages ranks have the rows; those of one stage have the same."""

STAGES_OF_MANY = (1, 8, 64)
NAME_BYTES = 48  # of a site and its family, as ranks tell them
(REDUCTION,) = builtin_reductions(FIVE_METRICS, is_complex=False)
KIND = on_the_wire(REDUCTION)
EXTREMES, MOMENTS = 1, 1  # of the columns of KIND: absmax, moment2


@dataclass(frozen=True)
class Joining:
    """Of one number of processes and rows: seconds of a step, and those of the training thread.

    ``layout`` is a name in ``STAGES``.
    """

    ranks: int
    layout: str
    rows: int
    seconds: float
    low: float
    high: float
    training_seconds: float


@dataclass(frozen=True)
class CostModel:
    """Seconds to join a step: those of one rank alone, and of the messages.

    An all-reduce by recursive doubling sends floor(log2(ranks)) messages one after the other, two
    more unless ranks are a power of two. A message takes ``latency`` seconds and its bytes over
    ``bandwidth`` (bytes a second); what a rank does by itself takes ``base`` seconds and
    ``per_row`` for each row.

    All rows of all stages are in the messages of each rank, whichever it has: so a step of a
    pipeline, or on a mesh of two dimensions, takes as long as one where all ranks have all rows.

    Assumes that ranks come at the same time, that messages between different pairs of ranks do not
    slow each other, and that each rank has two cores, one for gloo's own thread: that polls without
    a pause while a message of its connection is being written, so that with fewer cores a message
    waits for slices of the scheduler. ``latency`` is therefore also measured on 4 ranks.
    """

    latency: float
    bandwidth: float
    base: float
    per_row: float

    @staticmethod
    def fitted(alone: Sequence[Joining], ranks: int, reductions: Mapping[int, float]) -> CostModel:
        """From steps of one rank, and reductions (bytes to seconds) over some ``ranks``."""
        per_row, base = np.polyfit([line.rows for line in alone], [x.seconds for x in alone], 1)
        small, large = min(reductions), max(reductions)
        seconds = {size: reductions[size] / messages(ranks) for size in (small, large)}
        bandwidth = (large - small) / max(seconds[large] - seconds[small], 1e-9)
        return CostModel(seconds[small], bandwidth, float(base), float(per_row))

    def seconds(self, ranks: int, rows: int) -> float:
        """Time to join a step of ``rows`` rows of five metrics."""
        total = self.base + self.per_row * rows
        for size in sizes_of(rows):
            total += messages(ranks) * (self.latency + size / self.bandwidth)
        return total


def messages(ranks: int) -> int:
    """That follow one another in an all-reduce."""
    power_of_two = ranks & (ranks - 1) == 0
    return ranks.bit_length() - 1 + (0 if power_of_two else 2)


def sizes_of(rows: int) -> tuple[int, int, int]:
    """Bytes of the three collectives of a step: the maximum, and both sums."""
    summed = len(KIND.columns) - MOMENTS
    return 8 * (5 + rows * EXTREMES), 8 * rows * summed, 8 * rows * MOMENTS


@dataclass(frozen=True)
class Step:
    """A step with rows of made-up tensors."""

    step: int
    sites: tuple[str, ...]

    def contribution(self) -> Exchange:
        """The rows."""
        return Exchange({KIND: (self.sites, np.ones((len(self.sites), KIND.width)))})


def own_sites(rows: int, ranks: int, stages: int) -> tuple[str, ...]:
    """Those of the stage that this rank has."""
    own = range(rows)[dist.get_rank() * stages // ranks :: stages]
    return tuple(f"activation/{index}" for index in own)


def joining(ranks: int, layouts: Sequence[str], rounds: int) -> list[Joining]:
    """Time steps of each number of rows, those of the layouts in turns; all ranks call this."""
    found = []
    for rows in ROWS:
        crosses = {layout: CrossRank(ProcessGroup()) for layout in layouts}
        seconds: dict[str, list[float]] = {layout: [] for layout in layouts}
        training: dict[str, list[float]] = {layout: [] for layout in layouts}
        sites = {layout: own_sites(rows, ranks, STAGES[layout]) for layout in layouts}
        for step in range(rounds + 5):
            for layout, cross in crosses.items():
                dist.barrier()
                started = time.perf_counter()
                turn = cross.submit(Step(step, sites[layout]))
                training[layout].append(time.perf_counter() - started)
                turn.wait()
                seconds[layout].append(time.perf_counter() - started)
        for layout, cross in crosses.items():
            cross.close()
            ordered = sorted(seconds[layout][5:])
            quarter = len(ordered) // 4
            found.append(
                Joining(
                    *(ranks, layout, rows, statistics.median(ordered)),
                    *(ordered[quarter], ordered[-1 - quarter]),
                    statistics.median(training[layout][5:]),
                )
            )
    return found


def reductions(rounds: int) -> dict[int, float]:
    """Seconds of an all-reduce of that many bytes, in a thread of its own as tmm makes them."""
    group, found = ProcessGroup(), {}

    def reduce(size: int) -> None:
        values, seconds = np.ones(size // 8), []
        for _ in range(rounds + 5):
            dist.barrier()
            started = time.perf_counter()
            for _ in range(len(sizes_of(0))):
                group.total(values)
            seconds.append((time.perf_counter() - started) / len(sizes_of(0)))
        found[size] = statistics.median(seconds[5:])

    for size in (8, 8 * 1024, 8 * 65536):
        thread = threading.Thread(target=reduce, args=(size,))
        thread.start()
        thread.join()
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
    layouts = [layout for layout, stages in STAGES.items() if ranks == WORLDS[-1] or stages == 1]
    found = {
        "joining": [asdict(line) for line in joining(ranks, layouts, rounds)],
        "reductions": reductions(rounds),
        "training": training(max(5, rounds // 2)) if with_training else {},
    }
    if rank == 0:
        torch.save(found, Path(folder, f"{ranks}.pt"))
    dist.barrier()
    dist.destroy_process_group()


def model_check(line: Joining, models: Mapping[int, CostModel]) -> dict[str, str]:
    """A row of the table: measured, and predicted from messages between 2 and that many ranks."""
    here = models.get(line.ranks, models[2]).seconds(line.ranks, line.rows)
    return {
        "ranks": str(line.ranks),
        "ranks have": line.layout,
        "rows": str(line.rows),
        "ms": f"{line.seconds * 1e3:.2f}",
        "quartiles": f"{line.low * 1e3:.2f} to {line.high * 1e3:.2f}",
        "training thread, us": f"{line.training_seconds * 1e6:.0f}",
        "model, ms": f"{models[2].seconds(line.ranks, line.rows) * 1e3:.2f}",
        "with messages of so many ranks": f"{here * 1e3:.2f}",
        "measured / that": f"{line.seconds / here:.2f}",
    }


def model_prediction(model: CostModel, ranks: int, stages: int, rows: int) -> dict[str, str]:
    """A row of the table: what no machine here can measure."""
    size = messages(ranks) * sum(sizes_of(rows))
    return {
        "ranks": f"{ranks // stages} x {stages}",
        "rows": str(rows),
        "of a rank": str(rows // stages),
        "names, sent once": f"{rows * NAME_BYTES:,}",
        "messages in turn": str(messages(ranks) * len(sizes_of(rows))),
        "bytes each rank sends": f"{size:,}",
        "ms": f"{model.seconds(ranks, rows) * 1e3:.2f}",
    }


def table_of(title: str, lines: Sequence[Mapping[str, str]]) -> Table:
    """The lines, with their names above them."""
    table = Table(*lines[0], title=title)
    for line in lines:
        table.add_row(*line.values())
    return table


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
    alone = [line for line in lines if line.ranks == 1]
    models = {
        ranks: CostModel.fitted(alone, ranks, results[ranks]["reductions"]) for ranks in WORLDS[1:]
    }
    checked = [model_check(line, models) for line in lines]
    predicted = [
        model_prediction(models[2], ranks, stages, rows)
        for ranks in MANY
        for stages in STAGES_OF_MANY
        for rows in ROWS
        if stages <= ranks
    ]
    console = Console(width=110)
    console.print(table_of("joining a step", checked))
    console.print(table_of("as the model of 2 ranks says", predicted))
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
            "reductions": {ranks: results[ranks]["reductions"] for ranks in WORLDS},
            "training": results[2]["training"],
            "models": {ranks: asdict(model) for ranks, model in models.items()},
            "checked": checked,
            "predicted": predicted,
        }
        save_report("distributed", "cpu", report)


if __name__ == "__main__":
    typer.run(main)
