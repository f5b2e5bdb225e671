"""What it costs to watch every module: five metrics, each step monitored.

    python -m benchmarks.overhead [--rounds 100] [--quick] [--save]

Ratios within one run, variants interleaved; the cold compilation in fresh processes with empty
caches. The eager hooks compute the same five metrics with one torch call each and read them back
once per step.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import tmm
from benchmarks.five import five
from benchmarks.reading import outputs_of, reader
from benchmarks.report import save_report
from benchmarks.timing import Timing, environment, interleave
from benchmarks.workloads import (
    FIVE_METRICS,
    GPT_124M,
    GPT_SMALL,
    Workload,
    monitored_step,
    training_step,
)

SPEC = tmm.Spec(tmm.activation(*FIVE_METRICS))
GRADIENTS = tmm.Spec(tmm.activation_gradient(*FIVE_METRICS))


@dataclass(frozen=True)
class Line:
    """One line of the report: a ratio to the plain compiled program in the same rounds."""

    variant: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    goal: float | None = None


class EagerHooks:
    """The five metrics of every module's output by forward hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.values: list[torch.Tensor] = []
        for child in module.modules():
            child.register_forward_hook(self._measure)

    def _measure(self, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        self.values.append(five(output))

    def read(self) -> list[list[float]]:
        """All values of the step."""
        values: list[list[float]] = torch.stack(self.values).tolist()
        self.values.clear()
        return values


def compiled_steps(workload: Workload) -> dict[str, Callable[[], None]]:
    """Training steps of one and the same module, by the compiled programs."""
    module, tokens = workload.model(), workload.tokens()
    plain = torch.compile(module)
    watched = tmm.instrument(torch.compile(module), SPEC)
    backward = tmm.instrument(torch.compile(module), GRADIENTS)

    return {
        "plain compiled": training_step(module, plain, tokens),
        "tmm, not monitored": training_step(module, watched, tokens),
        "tmm, monitored": monitored_step(watched, training_step(module, watched, tokens)),
        "tmm, activation gradients": monitored_step(
            backward, training_step(module, backward, tokens)
        ),
    }


def eager_steps(workload: Workload) -> dict[str, Callable[[], None]]:
    """Training steps without compilation, with and without hooks."""
    tokens, bare, hooked = workload.tokens(), workload.model(), workload.model()
    hooks = EagerHooks(hooked)
    hooked_step = training_step(hooked, hooked, tokens)

    def with_hooks() -> None:
        hooked_step()
        hooks.read()

    return {"eager": training_step(bare, bare, tokens), "eager with hooks": with_hooks}


def read_once(workload: Workload) -> float:
    """Seconds to read every module's output once: the time of one sum over each."""
    outputs = outputs_of(workload.model(), workload.tokens())
    return interleave({"read": reader(outputs)}, rounds=20)["read"].median


def first_step_seconds(workload: Workload, *, watched: bool) -> float:
    """Seconds of the first training step of a process, which compiles everything."""
    module, tokens = workload.model(), workload.tokens()
    model = torch.compile(module)
    started = time.perf_counter()
    if watched:
        monitor = tmm.monitor(tmm.instrument(model, SPEC))
        with monitor.step(0):
            training_step(module, model, tokens)()
    else:
        training_step(module, model, tokens)()
    return time.perf_counter() - started


def cold_compilation(name: str, repeats: int) -> Timing:
    """First steps of fresh processes with empty caches, plain and watched in turns."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(repeats):
        for watched in (False, True):
            with tempfile.TemporaryDirectory() as cache:
                command = [sys.executable, "-m", "benchmarks.overhead", "--first-step", name]
                command += ["--watched"] if watched else []
                done = subprocess.run(
                    command,
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                    cwd=Path(__file__).parent.parent,
                    check=True,
                    capture_output=True,
                    text=True,
                )
                seconds[watched].append(float(done.stdout.split()[-1]))
    return Timing(tuple(seconds[True]), tuple(seconds[False]))


def measure(workload: Workload, rounds: int, repeats: int) -> list[Line]:
    """All lines of the report on one workload."""
    goals = {
        "tmm, monitored": 1.04,
        "tmm, not monitored": 1.005,
        "tmm, activation gradients": 1.04,
    }
    lines = []
    compiled = compiled_steps(workload)
    plain_step = next(iter(compiled.items()))
    timings = interleave(compiled, rounds)
    timings |= interleave(dict([plain_step]) | eager_steps(workload), max(5, rounds // 4))
    for variant, timing in timings.items():
        low, high = timing.interval
        lines.append(
            Line(variant, timing.median * 1e3, timing.ratio, low, high, goals.get(variant))
        )
    plain = lines[0].milliseconds
    read = read_once(workload) * 1e3
    lines.append(Line("reading every output once", read, read / plain, 0.0, 0.0))
    if repeats:
        cold = cold_compilation(workload.name, repeats)
        low, high = min(cold.ratios), max(cold.ratios)
        milliseconds = statistics.median(cold.baseline) * 1e3
        lines.append(Line("cold compilation, plain", milliseconds, 1.0, 1.0, 1.0))
        lines.append(
            Line("cold compilation, tmm", cold.median * 1e3, cold.ratio, low, high, goal=1.6)
        )
    return lines


def show(workload: Workload, lines: list[Line]) -> None:
    """Print the table."""
    table = Table("variant", "ms", "ratio", "95 % interval", "goal", title=workload.name)
    for line in lines:
        interval = f"{line.low:.4f} to {line.high:.4f}" if line.low else ""
        goal = "" if line.goal is None else f"<= {line.goal}"
        table.add_row(line.variant, f"{line.milliseconds:.2f}", f"{line.ratio:.4f}", interval, goal)
    Console(width=100).print(table)


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 100,
    repeats: Annotated[int, typer.Option(help="Cold compilations of each kind.")] = 3,
    quick: Annotated[bool, typer.Option(help="Few rounds, no cold compilation.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
    first_step: Annotated[str, typer.Option(hidden=True)] = "",
    watched: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Measure the overhead of five metrics on every module."""
    workloads = [GPT_124M] if torch.cuda.is_available() else [GPT_SMALL]
    if first_step:
        (workload,) = (w for w in workloads if w.name == first_step)
        print(first_step_seconds(workload, watched=watched))
        return
    if quick:
        rounds, repeats = 10, 0
    for workload in workloads:
        lines = measure(workload, rounds, repeats)
        show(workload, lines)
        report = {
            "workload": workload.name,
            "metrics": FIVE_METRICS,
            "modules": len(list(workload.model().modules())),
            "rounds": rounds,
            "environment": environment(),
            "lines": [asdict(line) for line in lines],
        }
        if save:
            save_report("overhead", workload.device, report)


if __name__ == "__main__":
    typer.run(main)
