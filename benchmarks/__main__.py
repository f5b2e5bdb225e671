"""The whole suite: one command, one table, one report.

    python -m benchmarks [--quick] [--only NAME,...] [--save]

Each question runs in a process of its own, so that none finds what another one compiled; all of
them share an Inductor cache that is empty at the start. A question that fails is listed with its
message, and the others run on. ``--save`` keeps ``benchmarks/results/suite-<machine>-<day>.json``,
with the reports of all questions; ``python -m benchmarks.check`` compares it with what is expected.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.report import FOLDER_VARIABLE, save_report, show
from benchmarks.timing import environment, machine_kind

QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "alternatives": ("--quick", "--toy"),
    "everything": ("--quick", "--toy"),
    "growth": ("--quick", "--toy"),
    "compilation": ("--quick", "--toy"),
    "architectures": ("--toy",),
    "host_time": ("--quick", "--toy"),
    "parameters": (),
}
"""What the suite asks, and in which of its short forms."""
FURTHER = (
    "attention",
    "distributed",
    "gpu_plan",
    "kernels",
    "module_monitor",
    "overhead",
    "reference",
    "store",
)
"""What it asks with ``--only``."""
ROOT = Path(__file__).parent.parent


def run_question(name: str, arguments: tuple[str, ...], cache: str) -> dict[str, Any]:
    """The report of one question, and how long it took; or what it said when it failed."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", "--save", *arguments],
            env={**os.environ, FOLDER_VARIABLE: folder, "TORCHINDUCTOR_CACHE_DIR": cache},
            cwd=ROOT,
            check=False,
            capture_output=True,
            text=True,
        )
        seconds = time.perf_counter() - started
        reports = sorted(Path(folder).glob("*.json"))
        if done.returncode or len(reports) != 1:
            return {"seconds": seconds, "error": (done.stderr or done.stdout)[-4000:]}
        report: dict[str, Any] = json.loads(reports[0].read_text())
        return {"seconds": seconds, "report": report}


def lines_of(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The lines that the common table shows of a question."""
    if "error" in found:
        last = found["error"].strip().splitlines()[-1:]
        return [{"variant": "FAILED", "note": "".join(last)}]
    lines: list[dict[str, Any]] = found["report"].get("lines", [])
    if not all("variant" in line for line in lines):
        return [{"variant": "its own table", "note": "see the report, or run it alone"}]
    return lines


def selected(only: str, *, quick: bool, toy: bool) -> dict[str, tuple[str, ...]]:
    """The questions to ask, with their arguments.

    Raises:
        typer.BadParameter: for a question that does not exist.
    """
    known = (*QUESTIONS, *FURTHER)
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = set(names) - set(known)
    if unknown:
        raise typer.BadParameter(
            f"--only: {', '.join(sorted(unknown))} is not one of {', '.join(known)}"
        )
    form = "--toy" if toy else "--quick" if quick else None
    usual = [name for name, forms in QUESTIONS.items() if form is None or form in forms]
    return dict.fromkeys(names or usual, () if form is None else (form,))


def main(
    quick: Annotated[bool, typer.Option(help="A few minutes on two cores.")] = False,
    only: Annotated[str, typer.Option(help="Questions, separated by commas.")] = "",
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
    toy: Annotated[bool, typer.Option(help="Toy models: only shows that it runs.")] = False,
) -> None:
    """Run the benchmarks."""
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, arguments in selected(only, quick=quick, toy=toy).items():
            found[name] = run_question(name, arguments, cache)
            print(f"{name}: {found[name]['seconds']:.0f} s", flush=True)
    lines = {name: lines_of(one) for name, one in found.items()}
    where = environment()
    title = f"{where['device']}, torch {where['torch']}, {where['threads']} threads"
    show(lines, title)
    report = {"environment": where, "machine": machine_kind(), "quick": quick, "questions": found}
    if save:
        print(save_report("suite", machine_kind(), report))
    if any("error" in one for one in found.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
