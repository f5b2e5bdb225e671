"""How long compiling takes, with cold and with warm caches, and what comes out of it.

    python -m benchmarks.compilation [--repeats 3] [--quick] [--save]

The first training step of fresh processes: with an empty cache of Inductor, and once more with what
the first one left there. Plain and monitored programs take turns. Kernels and the bytes that they
move are those of Inductor's own (see ``benchmarks/compiled.py``), counted in the cold processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.alternatives import ALL
from benchmarks.alternatives.__main__ import attach
from benchmarks.compiled import count_compiled
from benchmarks.everything import EVERYTHING, SPECS, watch
from benchmarks.report import Line, finish, with_goal
from benchmarks.timing import Timing
from benchmarks.workloads import Workload, usual_workload

PLAIN, OURS = "plain compiled", "tmm"
TRACED = "hooks before torch.compile"
VARIANTS = (PLAIN, OURS, EVERYTHING, TRACED, "custom operator")
LIMITS = {OURS: 1.5}
ROOT = Path(__file__).parent.parent


def first_step(variant: str, workload: Workload) -> Callable[[], object]:
    """Attach a monitor to a model and give the training step, which compiles everything."""
    if variant == EVERYTHING:
        watched = watch(workload.model(), workload, SPECS[EVERYTHING])
        return lambda: watched.run(monitored=True)
    (alternative,) = (one for one in ALL if one.name == variant)
    return attach(alternative, workload)[1]


def report_first_step(variant: str, *, toy: bool) -> None:
    """Print how long it took and what was compiled, as the last line."""
    torch._logging.set_logs(inductor_metrics=True)  # without which bytes are not counted
    step = first_step(variant, usual_workload(toy=toy))
    started = time.perf_counter()
    with count_compiled() as found:
        step()
    print(json.dumps({"seconds": time.perf_counter() - started, **asdict(found)}))


def in_fresh_process(variant: str, cache: str, *arguments: str) -> dict[str, Any]:
    """What a process of its own finds, with that folder as Inductor's cache."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.compilation", "--variant", variant, *arguments],
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    variants: tuple[str, ...], repeats: int, run: Callable[[str, str], Mapping[str, Any]]
) -> tuple[list[Line], dict[str, list[Mapping[str, Any]]]]:
    """Cold and warm first steps of each variant, in turns."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for _ in range(repeats):
        for variant in variants:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    found.setdefault(f"{variant}, {kind}", []).append(run(variant, cache))
    lines = []
    for kind in ("cold", "warm"):
        base = tuple(one["seconds"] for one in found[f"{variants[0]}, {kind}"])
        for variant in variants:
            times = Timing(tuple(one["seconds"] for one in found[f"{variant}, {kind}"]), base)
            counted = found[f"{variant}, cold"][0]
            note = (
                f"{counted['graphs']} graphs, {counted['breaks']} breaks,"
                f" {counted['kernels']} kernels, {counted['bytes_moved'] / 1e6:.0f} MB moved"
            )
            line = Line(
                *(f"{variant}, {kind} cache", times.median * 1e3, times.ratio),
                *(min(times.ratios), max(times.ratios)),
                note=note if kind == "cold" else f"range of {repeats} runs",
            )
            lines.append(with_goal(line, at_most=LIMITS.get(variant) if kind == "cold" else None))
    return lines, found


def main(
    repeats: Annotated[int, typer.Option(help="Runs of each kind.")] = 2,
    quick: Annotated[bool, typer.Option(help="One run each, plain and tmm only.")] = False,
    toy: Annotated[bool, typer.Option(help="A toy model: only shows that it runs.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
    variant: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Measure cold and warm compilation."""
    if variant:
        report_first_step(variant, toy=toy)
        return
    arguments = ["--toy"] if toy else []
    lines, found = measure(
        VARIANTS[:2] if quick or toy else VARIANTS,
        1 if quick or toy else repeats,
        lambda variant, cache: in_fresh_process(variant, cache, *arguments),
    )
    workload = usual_workload(toy=toy)
    title = f"compilation: {workload.name}"
    finish("compilation", workload.device, lines, save=save, title=title, runs=found)


if __name__ == "__main__":
    typer.run(main)
