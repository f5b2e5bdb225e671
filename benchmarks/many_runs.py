"""What listing many runs takes, with an index and without.

    python -m benchmarks.many_runs [--runs 10000] [--milliseconds 0.5] [--save]

Each run is a folder with four small files, as a training of five steps leaves it. "cold" is the
first list, "warm" one in a new process with the index that the first one has left. "far" is a
stand-in for the file system of another machine: each look into a folder, and each file that is
read, waits for ``--milliseconds`` more. What a real one takes is not measured here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.report import save_report
from benchmarks.timing import environment
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runs.run_index import VARIABLE
from tmm.runs.state import State
from tmm.runtime.store.run_writer import RunWriter

LONG_AGO = 1_700_000_000

PROGRAM = """
import sys, time
root, limit, wait = sys.argv[1], int(sys.argv[2]) or None, float(sys.argv[3])
from tmm.runs import catalog, run_folders, run_record
if wait:
    def slowed(module, name):
        original = getattr(module, name)
        def slow(*arguments):
            time.sleep(wait)
            return original(*arguments)
        setattr(module, name, slow)
    slowed(run_folders, "_look")
    slowed(run_record, "read_info")
    slowed(run_record, "open_run")
begin = time.perf_counter()
found = catalog.list_runs(root, limit=limit)
print(time.perf_counter() - begin, len(found))
"""


def build(root: Path, count: int) -> None:
    """A root with so many runs that have ended long ago."""
    pattern = root / "pattern"
    infos = (KeyInfo("loss", "", "loss", 0, "mean"),)
    with RunWriter(pattern, info={"id": "ID", "name": "NAME", "config": {"lr": 0.1}}) as writer:
        for step in range(5):
            writer.submit(StepRecord(step, scalars=(Table(infos, np.array([1.0 / (step + 1)])),)))
    State.begin().end("finished", "", 4).write(pattern)
    (pattern / "alive.lock").touch()
    text = (pattern / "run.json").read_text()
    for number in range(count):
        folder = root / f"project-{number % 10}" / f"run-{number:06d}"
        shutil.copytree(pattern, folder)
        (folder / "run.json").write_text(
            text.replace('"ID"', json.dumps(folder.name)).replace("NAME", f"name {number}")
        )
        for path in folder.iterdir():
            os.utime(path, (LONG_AGO, LONG_AGO))
    shutil.rmtree(pattern)


def seconds(root: Path, index: Path | None, limit: int, wait: float) -> float:
    """How long one list takes, in a process of its own, imports not counted."""
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(root), str(limit), str(wait)],
        env={**os.environ, VARIABLE: "" if index is None else str(index)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(result.stdout.split()[0])


def main(
    runs: Annotated[int, typer.Option(min=1, help="How many runs.")] = 10_000,
    milliseconds: Annotated[float, typer.Option(min=0, help="Of each wait, far away.")] = 0.5,
    save: Annotated[bool, typer.Option(help="Keep the report.")] = False,
) -> None:
    """Measure lists of the newest 50 runs, and of all with their steps."""
    lines = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "runs")
        root.mkdir()
        begin = time.perf_counter()
        build(root, runs)
        Console().print(f"{runs} runs built in {time.perf_counter() - begin:.0f} s")
        for place, wait in (("here", 0.0), ("far", milliseconds / 1000)):
            for limit in (50, 0):
                index = Path(name, f"index-{place}-{limit}")
                cold = seconds(root, index, limit, wait)
                warm = min(seconds(root, index, limit, wait) for _ in range(3))
                none = seconds(root, None, limit, wait)
                what = "the newest 50" if limit else "all, with steps"
                lines.append((place, what, cold, warm, none))
    table = RichTable("", "list", "cold (s)", "warm (s)", "no index (s)")
    for place, what, *times in lines:
        table.add_row(place, what, *(f"{value:.2f}" for value in times))
    Console().print(table)
    if save:
        save_report(
            "many_runs", "cpu", {"environment": environment(), "runs": runs, "lines": lines}
        )


if __name__ == "__main__":
    typer.run(main)
