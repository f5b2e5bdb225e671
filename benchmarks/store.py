"""What recording costs the training thread, and what reading back takes.

    python -m benchmarks.store [--keys 10000] [--steps 5000] [--quick] [--save]

Three stores get the same values: tmm's run folder, SQLite with one row per value (a transaction per
step, WAL mode), and the dictionary of torch-module-monitor 0.1.0, which lies in memory and is saved
as HDF5 at the end. "step" is the time that the training thread spends on a step: once handing it
over, and once waiting until it is on disk, as tmm does on a CPU.
"""

from __future__ import annotations

import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.report import save_report
from benchmarks.timing import environment
from tmm.core.metrics import FloatArray
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runs.recorded_run import open_run
from tmm.runtime.store.run_writer import RunWriter

READS = 5
PEER_STEPS = 200  # of the dictionary: it is saved one key after the other


@dataclass(frozen=True)
class Line:
    """A store: milliseconds of a step (median, 95th percentile) and of reading a series."""

    store: str
    steps: int
    step: float
    step_high: float
    read: float
    bytes_per_value: float


def values_of(step: int, keys: int) -> FloatArray:
    """What a step records: numbers that do not compress."""
    generator = np.random.default_rng(step)
    return generator.standard_normal(keys).astype(np.float32).astype(np.float64)


def names(count: int) -> list[str]:
    """Keys as a large model has them."""
    return [f"activation/transformer.h.{i // 10}.part_{i % 10}/rms" for i in range(count)]


@contextmanager
def spread(milliseconds: list[float]) -> Iterator[None]:
    """Append the time of the block."""
    started = time.perf_counter()
    yield
    milliseconds.append((time.perf_counter() - started) * 1e3)


def tmm_store(folder: Path, keys: int, steps: int, *, wait: float) -> Line:
    """A run folder."""
    infos = tuple(KeyInfo(key, "activation", key, i, "joined") for i, key in enumerate(names(keys)))
    path, spent = folder / f"run-{wait}", []
    with closing(RunWriter(path, info={})) as writer:
        for step in range(steps):
            record = StepRecord(step, (Table(infos, values_of(step, keys)),))
            with spread(spent):
                writer.submit(record, wait_seconds=wait)
            if not wait:
                time.sleep(0.004)  # a step of training, in which the writer's thread writes
    reads: list[float] = []
    for number in range(READS):
        with spread(reads), open_run(path) as run:
            found = run.series(infos[number * keys // READS].key)[1]
        assert found[-1] == values_of(steps - 1, keys)[number * keys // READS]
    name = "tmm, waiting for the disk" if wait else "tmm"
    size = sum(file.stat().st_size for file in path.glob("*.h5"))
    return line(name, steps, spent, reads, size / (keys * steps))


def sqlite_store(folder: Path, keys: int, steps: int) -> Line:
    """One row for each value, indexed by key and step."""
    path, spent = folder / "run.sqlite", []
    ids = list(enumerate(names(keys)))
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE keys (id INTEGER PRIMARY KEY, key TEXT)")
        database.execute(
            "CREATE TABLE metrics (key INTEGER, step INTEGER, value REAL,"
            " PRIMARY KEY (key, step)) WITHOUT ROWID"
        )
        database.executemany("INSERT INTO keys VALUES (?, ?)", ids)
        database.commit()
        for step in range(steps):
            rows = [(i, step, value) for i, value in enumerate(values_of(step, keys).tolist())]
            with spread(spent):
                database.executemany("INSERT INTO metrics VALUES (?, ?, ?)", rows)
                database.commit()
    reads: list[float] = []
    for number in range(READS):
        key = number * keys // READS
        with spread(reads), closing(sqlite3.connect(path)) as database:
            query = "SELECT step, value FROM metrics WHERE key = ? ORDER BY step"
            found = np.array(database.execute(query, (key,)).fetchall())
        assert found[-1, 1] == values_of(steps - 1, keys)[key]
    return line(
        "SQLite, a row per value", steps, spent, reads, path.stat().st_size / (keys * steps)
    )


def peer_store(folder: Path, keys: int, steps: int) -> Line:
    """The dictionary of torch-module-monitor; without slashes in keys, which its reader lacks."""
    from torch_module_monitor import StorageManager

    path, spent = folder / "peer.h5", []
    keys_of = [name.replace("/", ".") for name in names(keys)]
    storage = StorageManager()
    for step in range(steps):
        values = values_of(step, keys).tolist()
        with spread(spent):
            storage.create_step_entry(step)
            for key, value in zip(keys_of, values, strict=True):
                storage.log_scalar(step, key, value)
            storage.aggregate_step(step)
    storage.save_hdf5(str(path))
    reads: list[float] = []
    for number in range(READS):
        with spread(reads):
            StorageManager.read_hdf5_entry(str(path), keys_of[number * keys // READS])
    size = path.stat().st_size / (keys * steps)
    return line("torch-module-monitor, in memory", steps, spent, reads, size)


def line(
    store: str, steps: int, spent: list[float], reads: list[float], bytes_per_value: float
) -> Line:
    """A line of the report; the first steps, which set up files, are left out."""
    settled = sorted(spent[min(5, len(spent) // 2) :])
    high = settled[int(0.95 * (len(settled) - 1))]
    middle = statistics.median(settled)
    return Line(store, steps, middle, high, statistics.median(reads), bytes_per_value)


def main(
    keys: Annotated[int, typer.Option(help="Values of a step.")] = 10_000,
    steps: Annotated[int, typer.Option(help="Steps of a run.")] = 5_000,
    quick: Annotated[bool, typer.Option(help="A tenth of the steps.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Compare stores of the same values."""
    steps = max(10, steps // 10) if quick else steps
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stores: list[Callable[[], Line]] = [
            lambda: tmm_store(folder, keys, steps, wait=0.0),
            lambda: tmm_store(folder, keys, steps, wait=0.05),
            lambda: sqlite_store(folder, keys, min(steps, 500)),
            lambda: peer_store(folder, keys, min(steps, PEER_STEPS)),
        ]
        lines = [store() for store in stores]
    columns = ("store", "steps", "step, ms", "95 %", "read a series, ms", "bytes per value")
    table = RichTable(*columns, title=f"{keys} values a step")
    for found in lines:
        numbers = (found.step, found.step_high, found.read, found.bytes_per_value)
        table.add_row(found.store, str(found.steps), *(f"{number:.2f}" for number in numbers))
    Console(width=110).print(table)
    if save:
        report = {"keys": keys, "environment": environment()}
        save_report("store", "cpu", report | {"lines": [asdict(found) for found in lines]})


if __name__ == "__main__":
    typer.run(main)
