"""What a monitored step of 2,000 rows costs beside the reductions: packing, collecting, storing.

    python -m benchmarks.host_time [--rows 2000] [--rounds 300] [--quick] [--save]

Rows of five metrics, all on the CPU. "Packing" is what 2,000 reductions of one number take longer
that write their rows into one tensor, as those of a program of Inductor do, than such as give each
row by itself; "joining" makes one tensor of 2,000 rows, as other programs do. "Collecting" turns
them into values by key, "handing over" gives these to the thread that writes a run and "storing"
waits until the file holds them, as tmm does on a CPU. Each is timed behind itself, and behind a
matrix product, which leaves nothing of it in the caches, as the operators of a training do. Ratios
are to 200 microseconds, the goal of packing (where it takes any time), collecting and handing over
together.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.report import Line, finish, timed, with_goal
from benchmarks.timing import Timing, keep_freed_memory
from benchmarks.workloads import FIVE_METRICS
from tmm.core.metrics import COLUMN_SEPARATOR, builtin_reductions
from tmm.core.records import Measurement, PackedLayout, Site, Slot, StepRecord
from tmm.kernels.ops import pack, summarize, summarize_into
from tmm.runtime.key_binding import KeyRegistry
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.store.run_writer import RunWriter

GOAL = 200e-6
WARM_UP = 5
ALONE, IN_PLACE = "reducing, rows by themselves", "reducing, rows in place"
ALL = "packing, collecting and handing over"
COLUMNS = COLUMN_SEPARATOR.join(("count", "sum", "sum_squares", "absmax", "zeros"))


class Step:
    """The parts of a step of ``rows`` sites, each of which leaves the next one what it needs."""

    def __init__(self, rows: int, writer: RunWriter) -> None:
        (reduction,) = builtin_reductions(FIVE_METRICS, is_complex=False)
        self._rows = [torch.rand(reduction.width, dtype=torch.float64) for _ in range(rows)]
        layout = tuple(
            Slot.of(
                Measurement(
                    "activation", Site(f"transformer.h.{i // 10}.part_{i % 10}"), reduction
                ),
                i * reduction.width,
            )
            for i in range(rows)
        )
        self._registry = KeyRegistry()
        self._binding = self._registry.bind(PackedLayout(layout, 1), lambda m: m.site)
        self._writer = writer
        self._packed = torch.cat(self._rows)
        self._number_alone = torch.rand(1)
        self._width = COLUMNS.count(COLUMN_SEPARATOR) + 1
        self._written = torch.empty(rows * self._width, dtype=torch.float64)
        self._record = StepRecord(0)
        self._number = 0

    def reduce(self) -> None:
        """Give each row by itself."""
        for _ in self._rows:
            summarize(self._number_alone, COLUMNS)

    def reduce_in_place(self) -> None:
        """Write each row where it belongs."""
        for index in range(len(self._rows)):
            summarize_into(self._written, index * self._width, self._number_alone, COLUMNS)

    def join(self) -> None:
        """Join rows that are there."""
        self._packed = pack(self._rows)

    def collect(self) -> None:
        """Turn them into values by key."""
        self._number += 1
        collector = StepCollector(self._number, self._registry, monitored=True)
        collector.add(self._binding, [self._packed])
        self._record = collector.record()

    def hand_over(self) -> None:
        """Give them to the writer's thread."""
        self._writer.submit(self._record)

    def store(self) -> None:
        """Give them to the writer's thread and wait for the file."""
        self._writer.submit(self._record, wait_seconds=1.0)

    def finish_writing(self) -> None:
        """Wait for the writer's thread."""
        self._writer.flush()


@contextmanager
def steps(rows: int) -> Iterator[Step]:
    """A step with a run to write to."""
    with tempfile.TemporaryDirectory() as folder, RunWriter(Path(folder, "run"), info={}) as writer:
        yield Step(rows, writer)


def measure(
    step: Step, rounds: int, between: Callable[[], object] | None = None
) -> dict[str, list[float]]:
    """Seconds of each part, with ``between``, or the same part, before it."""
    parts = {
        ALONE: step.reduce,
        IN_PLACE: step.reduce_in_place,
        "joining": step.join,
        "collecting": step.collect,
        "handing over": step.hand_over,
        "storing": step.store,
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(WARM_UP + rounds):
        for name, part in parts.items():
            step.finish_writing()
            (between or part)()
            step.finish_writing()
            started = time.perf_counter()
            part()
            if turn >= WARM_UP:
                seconds[name].append(time.perf_counter() - started)
    alone, in_place = seconds.pop(ALONE), seconds.pop(IN_PLACE)
    packing = [own - other for own, other in zip(in_place, alone, strict=True)]
    in_full = [max(taken, 0.0) for taken in packing]
    most = in_full, seconds["collecting"], seconds["handing over"]
    together = [sum(taken) for taken in zip(*most, strict=True)]
    return {"packing": packing, **seconds, ALL: together}


def lines_of(seconds: Mapping[str, list[float]], where: str) -> list[Line]:
    """The lines of all parts."""
    return [
        with_goal(
            timed(f"{name}, {where}", Timing(tuple(taken), (GOAL,) * len(taken)), "over 200 us"),
            at_most=1.0 if name == ALL else None,
        )
        for name, taken in seconds.items()
    ]


def main(
    rows: Annotated[int, typer.Option(help="Sites of the model.")] = 2000,
    rounds: Annotated[int, typer.Option(help="Rounds.")] = 300,
    quick: Annotated[bool, typer.Option(help="Few rounds.")] = False,
    toy: Annotated[bool, typer.Option(help="Few sites: only shows that it runs.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure what a monitored step costs beside the reductions."""
    rows, rounds = (20, 3) if toy else (rows, 50 if quick else rounds)
    keep_freed_memory()
    matrix = torch.rand(2048, 2048)
    with steps(rows) as step:
        lines = lines_of(measure(step, rounds), "in a loop")
        lines += lines_of(measure(step, rounds, lambda: matrix @ matrix), "behind a product")
    title = f"{rows} rows of five metrics, beside the reductions"
    finish("host-time", "cpu", lines, save=save, title=title, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
