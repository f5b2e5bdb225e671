"""The bill of a run: 20 training steps in fresh processes, with cold and with warm caches.

    python -m benchmarks.compilation [--repeats 2] [--task GPT] [--only "NAME;..."] [--quick]

A process trains with an empty cache of Inductor, and another one with what the first one left
there. Seconds are those to the end of the first step and of the last one, after torch is imported
and the model built. Variants take turns (``benchmarks/bill/variants.py``), on a GPT, a GPT of 24
blocks that are compiled one by one, and one whose graphs break. Ratios are to the plain compiled
program with the same kind of cache, and their ranges those of all repeats.

tmm's own kernels are compiled once per user and machine, and kept in ``tmm/`` of Inductor's cache
(TORCHINDUCTOR_CACHE_DIR). A cold cache holds them, and nothing else. One more line is of a machine
that has not compiled them either. Memory is the most that the process has held (``ru_maxrss``; on a
GPU the most that torch has allocated there), beside that of the plain one. Kernels and the bytes
that they move are those of Inductor's own (see ``benchmarks/compiled.py``), of cold processes.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.bill.imports import as_installed, import_lines, time_imports
from benchmarks.bill.lines import COLD, FRESH, WARM, lines_of, table_of
from benchmarks.bill.process import STEPS
from benchmarks.bill.tasks import tasks
from benchmarks.bill.variants import EVERYTHING, QUICK, TENTH, VARIANTS, Variant
from benchmarks.report import Line, finish

ROOT = Path(__file__).parent.parent
Process = Callable[[str, str, Path], Mapping[str, Any]]
"""Runs a variant of a task with a folder as Inductor's cache, and gives what it found."""


class ProcessError(Exception):
    """A process failed; the message is the last line that it wrote."""


def run_process(arguments: Sequence[str], cache: Path) -> str:
    """What a process of its own prints, with that folder as Inductor's cache."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=as_installed(TORCHINDUCTOR_CACHE_DIR=str(cache)),
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ProcessError("".join(done.stderr.strip().splitlines()[-1:])[:200] or "it failed")
    return done.stdout


def bill_of(task: str, variant: str, cache: Path, *more: str) -> dict[str, Any]:
    """What one training found."""
    arguments = ["-m", "benchmarks.bill.process", task, variant, *more]
    found: dict[str, Any] = json.loads(run_process(arguments, cache).splitlines()[-1])
    return found


def measure(
    task: str, variants: Sequence[Variant], repeats: int, run: Process, kernels: Path | None
) -> tuple[dict[str, dict[str, list[Mapping[str, Any]]]], dict[str, str]]:
    """Cold and warm trainings of each variant, in turns; and why some failed.

    ``kernels`` is a cache with tmm's own kernels, which are given to each cold one.
    """
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    failed: dict[str, str] = {}

    def add(variant: Variant, kind: str, cache: Path) -> None:
        runs = found.setdefault(variant.name, {}).setdefault(kind, [])
        runs.append(run(task, variant.name, cache))

    for turn in range(repeats):
        for variant in variants:
            if variant.name in failed:
                continue
            try:
                with tempfile.TemporaryDirectory() as cache:
                    if kernels is not None:
                        shutil.copytree(kernels / "tmm", Path(cache) / "tmm")
                    for kind in (COLD, WARM):
                        add(variant, kind, Path(cache))
                if variant.name == TENTH and kernels is not None and not turn:
                    with tempfile.TemporaryDirectory() as cache:
                        add(variant, FRESH, Path(cache))
            except ProcessError as error:
                if variant is variants[0]:
                    raise
                failed[variant.name] = f"fails: {error}"
                found.pop(variant.name, None)
    return found, failed


def chosen_variants(only: str, *, quick: bool) -> list[Variant]:
    """Those that are asked for, behind the one that they are compared with.

    Raises:
        typer.BadParameter: for a name that does not exist.
    """
    wanted = {name.strip() for name in only.split(";")} - {""}
    if unknown := wanted - {variant.name for variant in VARIANTS}:
        raise typer.BadParameter(f"--only: there is no {'; '.join(sorted(unknown))}")
    wanted = wanted or (set(QUICK) if quick else {variant.name for variant in VARIANTS})
    return [variant for variant in VARIANTS if variant.name in wanted | {VARIANTS[0].name}]


def is_installed(variant: Variant) -> bool:
    """Whether a variant's package is there."""
    return variant.package is None or importlib.util.find_spec(variant.package) is not None


def main(
    repeats: Annotated[int, typer.Option(help="Rounds.")] = 2,
    task: Annotated[str, typer.Option(help="GPT, blocks or breaks; all of them without.")] = "",
    only: Annotated[str, typer.Option(help="Names of variants, separated by semicolons.")] = "",
    quick: Annotated[bool, typer.Option(help="One round, GPT, plain and tmm only.")] = False,
    toy: Annotated[bool, typer.Option(help="Toy models: only shows that it runs.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure what 20 steps cost."""
    known = tasks(toy=toy)
    if task not in ("", *known):
        raise typer.BadParameter(f"--task: {task} is not one of {', '.join(known)}")
    variants = chosen_variants(only, quick=quick or toy)
    absent = {one.name: "not installed" for one in variants if not is_installed(one)}
    repeats = 1 if quick or toy else repeats
    more = ("--toy", "--steps", "2") if toy else ()
    lines: list[Line] = import_lines([time_imports() for _ in range(3 * repeats)])
    runs = {}
    with tempfile.TemporaryDirectory() as kernels:
        bill_of("GPT", EVERYTHING, Path(kernels), "--toy", "--steps", "1")  # compiles all of them
        for name in [task] if task else ["GPT"] if quick or toy else list(known):
            found, failed = measure(
                *(name, [one for one in variants if one.name not in absent], repeats),
                lambda *what: bill_of(*what, *more),
                Path(kernels),
            )
            runs[name] = found
            title = f"{known[name].workload.name}: {STEPS} steps, seconds and ratios"
            Console(width=180).print(table_of(title, variants, found))
            lines += lines_of(name, variants, found, absent | failed)
    device = known["GPT"].workload.device
    title = f"the bill of {STEPS} steps: {', '.join(known[name].workload.name for name in runs)}"
    finish("compilation", device, lines, save=save, title=title, runs=runs)


if __name__ == "__main__":
    typer.run(main)
