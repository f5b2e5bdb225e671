"""All that is to be known of tmm on a GPU, in the minutes for which there is one.

    python -m benchmarks.gpu [--minutes 8] [--folder gpu-report] [--only "NAME;..."]

Is it true: kernels by their definitions, models by eager hooks. What does it cost: time, launches,
memory, with CUDA graphs, and a trace. The parts stand in the order of their value. Each one runs in
a process of its own, so that a crash of the device costs no other one, and keeps what it has found
by then. What the time does not suffice for is named. ``report.md`` and ``report.json`` are written
anew after each part. Without a GPU, ``--device cpu --toy`` shows that it runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.on_gpu.findings import PartReport, read_findings, write_report
from benchmarks.on_gpu.parts import PARTS, Part
from benchmarks.timing import environment

ROOT = Path(__file__).parent.parent


def run_part(
    part: Part, device: str, folder: Path, cache: Path, seconds: float, *, toy: bool
) -> PartReport:
    """Run a part in a process of its own; what it has found is kept however it ends.

    While it runs its findings lie in a file of ``folder``. ``cache`` keeps what parts compile.
    """
    file = folder / f"{part.name.replace(' ', '-')}.jsonl"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.on_gpu.process"]
    command += [part.name, device, str(file), f"{seconds:.0f}", *(("toy",) if toy else ())]
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **caches},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    ended_by, is_cut = "", False
    try:
        _, errors = process.communicate(timeout=seconds)
        if process.returncode:
            last = "".join(errors.strip().splitlines()[-1:])
            ended_by = f"exit status {process.returncode}: {last}"[:1000]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
        process.communicate()
        ended_by, is_cut = f"its time was over, {seconds:.0f} s", True
    took = time.perf_counter() - started
    findings = read_findings(file)
    file.unlink(missing_ok=True)
    return PartReport(part.name, part.does, findings, took, ended_by, is_cut)


def run_all(
    parts: Sequence[Part],
    minutes: float,
    run: Callable[[Part, float], PartReport],
    written: Callable[[Sequence[PartReport]], object],
    clock: Callable[[], float] = time.monotonic,
) -> list[PartReport]:
    """Run the parts in their order, as far as the time suffices; report after each one."""
    end = clock() + 60 * minutes
    reports: list[PartReport] = []
    for part in parts:
        left = end - clock()
        if left < part.least:
            reason = f"not begun: {max(left, 0):.0f} s were left"
            reports.append(PartReport(part.name, part.does, (), 0.0, reason, is_cut=True))
        else:
            reports.append(run(part, min(part.most, left)))
        written(reports)
    return reports


def chosen(only: str) -> list[Part]:
    """The parts that are asked for.

    Raises:
        typer.BadParameter: for a name that does not exist.
    """
    wanted = {name.strip() for name in only.split(";")} - {""}
    names = [part.name for part in PARTS]
    if unknown := wanted - set(names):
        raise typer.BadParameter(
            f"--only: {'; '.join(sorted(unknown))} is not one of {'; '.join(names)}"
        )
    return [part for part in PARTS if not wanted or part.name in wanted]


def show(reports: Sequence[PartReport]) -> None:
    """Print a table of all findings."""
    table = Table("part", "what", "found", "", title="on the device")
    marks = {True: "good", False: "BAD", None: ""}
    for report in reports:
        for index, one in enumerate(report.findings):
            name = "" if index else report.name
            table.add_row(name, one.what[:70], one.text.splitlines()[0][:90], marks[one.is_good])
        if report.ended_by:
            table.add_row(
                "" if report.findings else report.name, "ended early", report.ended_by, ""
            )
        table.add_section()
    Console(width=180).print(table)


def main(
    minutes: Annotated[float, typer.Option(min=0.0, help="For all parts together.")] = 8.0,
    device: Annotated[str, typer.Option(help="cuda, cuda:1, or cpu.")] = "cuda",
    folder: Annotated[Path, typer.Option(help="Where the report goes.")] = Path("gpu-report"),
    only: Annotated[str, typer.Option(help="Parts, separated by semicolons.")] = "",
    toy: Annotated[bool, typer.Option(help="Small sizes: only shows that it runs.")] = False,
) -> None:
    """Measure truth and cost on a GPU."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        print("there is no GPU here: --device cpu --toy shows that it runs")
        raise typer.Exit(1)
    parts = chosen(only)
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    where = environment()
    title = f"tmm on {where['device'] if device != 'cpu' else 'a CPU'}"

    def write(found: Sequence[PartReport]) -> None:
        write_report(folder, title, found, where)

    with tempfile.TemporaryDirectory() as cache:

        def run(part: Part, seconds: float) -> PartReport:
            print(f"{part.name}: at most {seconds:.0f} s", flush=True)
            return run_part(part, device, folder, Path(cache), seconds, toy=toy)

        reports = run_all(parts, minutes, run, write)
    show(reports)
    print(folder / "report.md")
    if not all(report.is_good for report in reports):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
