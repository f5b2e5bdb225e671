"""Runs whose files somebody damaged; ``python -m tests.hostile_runs`` reads many of them.

That is a process of its own, with limits of time and memory: what hangs, crashes or grows ends it.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tmm.core.records import Event, KeyInfo, StepRecord, Table
from tmm.runs.artifacts import read_samples
from tmm.runs.catalog import list_runs
from tmm.runs.recorded_run import open_run
from tmm.runs.state import LOCK_NAME, State
from tmm.runtime.store.hdf5_bytes import checksum
from tmm.runtime.store.run_writer import RunWriter

STEPS, KEYS, BINS = 40, 20, 8
SAMPLE = Path("samples", "step-00000003.npz")
LONG_AGO = 1_600_000_000  # when nobody writes any more

_MOST_SECONDS = 20.0  # for one run
_MOST_MEMORY = 512 << 20  # more than before, in bytes
_SIGNATURES = re.compile(b"OHDR|FRHP|BTHD|BTLF|EAHD|EAIB|EADB")
_LONGEST_BLOCK = 320

Mutation = Callable[[random.Random, str, bytes], bytes]


def write_run(folder: Path, steps: int = STEPS) -> Path:
    """A finished run with two segments, numbers, histograms, events, samples and a text."""
    wide = tuple(KeyInfo(f"a/{i}", "activation", str(i), i, "mean") for i in range(KEYS))
    loss = (KeyInfo("loss", "", "loss", KEYS, "mean", "logged"),)
    histogram = (KeyInfo("a/histogram", "activation", "0", 0, "mean"),)
    info = {
        "id": folder.name,
        "project": "p",
        "name": "n",
        "config": {"lr": 0.1, "deep": {"er": [1]}},
        "tags": ["a"],
        "notes": "some",
    }
    edges = np.linspace(-1, 1, BINS + 1)
    for first in (0, steps):
        with RunWriter(folder, info=info, histogram_edges=edges) as writer:
            for step in range(first, first + steps):
                tables = (Table(loss, np.array([1.0 + step])), Table(wide, np.full(KEYS, 0.5)))
                bins = (Table(histogram, np.full((1, BINS), float(step))),) if step % 4 == 0 else ()
                events = (Event(step, "gap", "for a reason"),) if step % 10 == 0 else ()
                writer.submit(StepRecord(step, tables, bins, events))
    State.begin().end("finished", "", 2 * steps - 1).write(folder)
    (folder / "explain.txt").write_text("all of it\n")
    (folder / LOCK_NAME).touch()
    (folder / SAMPLE).parent.mkdir()
    np.savez_compressed(folder / SAMPLE, **{"array:x": np.arange(6.0).reshape(2, 3)})
    return folder


def read_all(folder: Path) -> int:
    """Read everything of a run; return how many steps there are."""
    with open_run(folder) as run:
        keys = run.keys()
        for key in keys[::3]:
            run.series(key)
            run.is_histogram(key)
        run.table([key for key in keys if not run.is_histogram(key)])
        steps = run.steps
        if len(steps):
            run.at(int(steps[-1]))
        assert all(isinstance(event.text, str) for event in run.events)
        run.histogram_edges, run.info, run.state, run.sample_steps  # noqa: B018
        run.text("explain.txt")
        return len(steps)


# Mutations of the bytes of a file


def flipped(rng: random.Random, name: str, data: bytes) -> bytes:
    result = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
    return bytes(result)


def cut(rng: random.Random, name: str, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def with_block(rng: random.Random, name: str, data: bytes) -> bytes:
    """With a block inserted, or in the place of another."""
    size, start = rng.choice((1, 8, 64, 512, 4096)), rng.randrange(len(data))
    block = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), data[:size]))
    return data[:start] + block + data[start + rng.choice((0, size)) :]


def odd_field(rng: random.Random, name: str, data: bytes) -> bytes:
    """With another value somewhere in its JSON, or something in its archive, or bytes flipped."""
    if not name.endswith(".json"):
        return rechecked(rng, name, data) if name.endswith(".h5") else flipped(rng, name, data)
    whole: Any = json.loads(data)
    found, key = rng.choice(list(_fields(whole)))
    odd: tuple[Any, ...] = (
        *(None, True, -1, 10**30, 1e308, float("nan"), "", "\x1b[2J\u202e", "x" * 10_000),
        *([], {}, [[]], [{"a": 1}], {"a": {}}, json.loads("[" * 90 + "]" * 90)),
    )
    found[key] = rng.choice(odd)
    text = json.dumps(whole)
    return (text[:-1] + rng.choice(("}", f", {text[1:]}", ""))).encode()


def rechecked(rng: random.Random, name: str, data: bytes) -> bytes:
    """With some bytes of HDF5's own changed, and the checksums made right again."""
    blocks = _blocks(data)
    result = bytearray(data)
    for start, size in rng.choices(blocks, k=rng.randint(1, 2)):
        for _ in range(rng.randint(1, 3)):
            place = start + 4 + rng.randrange(size - 4)
            bit = result[place] ^ 1 << rng.randrange(8)
            result[place] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF, bit, rng.randrange(256)))
        new = checksum(bytes(result[start : start + size]))
        result[start + size : start + size + 4] = new.to_bytes(4, "little")
    return bytes(result)


MUTATIONS: tuple[Mutation, ...] = (flipped, cut, with_block, odd_field, rechecked)
_known: dict[bytes, list[tuple[int, int]]] = {}


def _blocks(data: bytes) -> list[tuple[int, int]]:
    """Place and size of the blocks that have checksums."""
    if data not in _known:
        starts = [match.start() for match in _SIGNATURES.finditer(data)]
        sizes = range(22, _LONGEST_BLOCK)
        _known[data] = [
            (start, size)
            for start in starts
            for size in sizes
            if checksum(data[start : start + size]).to_bytes(4, "little")
            == data[start + size : start + size + 4]
        ]
    return _known[data]


def _fields(value: Any) -> Iterator[tuple[Any, Any]]:
    """All places in JSON: what they are in, and where there."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _fields(inner)


# The process that reads them


def mutate(rng: random.Random, whole: dict[Path, bytes]) -> dict[Path, bytes | None]:
    """What one file holds instead, or several; None for a file that is gone."""
    names = sorted(path for path, data in whole.items() if data)
    name = rng.choice(names)
    kind = rng.randrange(len(MUTATIONS) + 2)
    if kind == len(MUTATIONS):
        return {name: None}
    if kind > len(MUTATIONS):  # files change places
        other = rng.choice(names)
        return {name: whole[other], other: whole[name]}
    mutation = MUTATIONS[kind]
    if mutation is rechecked:
        name = rng.choice([path for path in names if path.suffix == ".h5"])
    return {name: mutation(rng, name.name, whole[name])}


def _limit() -> None:
    """What takes too much memory gets a MemoryError, and what takes too long ends the process."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used + _MOST_MEMORY,) * 2)


def _outcome(root: Path, folder: Path) -> str:
    """What came of reading a run; other errors than those that are documented are raised."""
    records = list_runs(root)
    assert len(records) <= 1, records
    outcome = records[0].status if records else "no run"
    try:
        read_all(folder)
    except (ValueError, OSError):
        outcome += ", refused"
    if (folder / SAMPLE).exists():
        with suppress(ValueError, OSError):
            read_samples(folder, 3)
    return outcome


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = ((path, path.stat()) for path in sorted(folder.rglob("*")))
    return {str(path): (status.st_size, status.st_mtime_ns) for path, status in found}


def read_mutations(root: Path, first: int, count: int) -> dict[str, Any]:
    """Read ``count`` mutations of a run under ``root``; tell what came of them."""
    folder = write_run(root / "run")
    whole = {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }
    for path in folder.rglob("*"):
        os.utime(path, (LONG_AGO, LONG_AGO))
    read_all(folder)
    _limit()
    outcomes: Counter[str] = Counter()
    faults = []
    for seed in range(first, first + count):
        changed = mutate(random.Random(seed), whole)
        for name, data in changed.items():
            (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
            if data is not None:
                os.utime(folder / name, (LONG_AGO, LONG_AGO))
        before, began = _stamps(folder), time.monotonic()
        (root / "seed").write_text(str(seed))
        signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS)
        try:
            outcomes[_outcome(root, folder)] += 1
        except Exception as error:
            faults.append(f"seed {seed}: {type(error).__name__}: {error!s:.200}")
        signal.setitimer(signal.ITIMER_REAL, 0)
        if _stamps(folder) != before:
            faults.append(f"seed {seed}: reading changed the run")
        if time.monotonic() - began > _MOST_SECONDS / 4:
            faults.append(f"seed {seed}: it took {time.monotonic() - began:.1f} s")
        for name in changed:
            (folder / name).write_bytes(whole[name])
    return {"outcomes": outcomes, "faults": faults}


if __name__ == "__main__":
    print(json.dumps(read_mutations(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
