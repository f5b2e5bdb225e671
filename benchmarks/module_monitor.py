"""One script with either import: ``ModuleMonitor`` of torch-module-monitor, and of tmm.

    python -m benchmarks.module_monitor [--rounds 20] [--quick] [--save]

Needs ``pip install --no-deps torch-module-monitor``. Every step is monitored: five metrics of the
outputs of all modules, the norm of every parameter and gradient; in the second script also the
norms of the differences of all outputs from those of a reference, whose forward pass the script
runs, though tmm can do without. Times are of whole steps, against the step of the same model
without a monitor, uncompiled or compiled, in the same rounds.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.five import METRICS
from benchmarks.parameters import peak_memory
from benchmarks.report import save_report
from benchmarks.timing import environment, interleave
from benchmarks.workloads import GPT_124M, GPT_SMALL, Workload, training_step

LIBRARIES = ("torch_module_monitor", "tmm")
LEFT_OUT = "tmm, the reference's pass left out"


@dataclass(frozen=True)
class Line:
    """A script with a library: its step, the ratio to that without a monitor, the most it holds."""

    script: str
    variant: str
    milliseconds: float
    ratio: float
    low: float
    high: float
    peak_bytes: int


def monitored(
    library: ModuleType,
    workload: Workload,
    *,
    compiled: bool,
    compares: bool,
    runs_reference: bool = True,
) -> Callable[[], None]:
    """A monitored training step, as torch-module-monitor's README writes it."""
    module, tokens = workload.model(), workload.tokens()
    model = torch.compile(module) if compiled else module
    reference = copy.deepcopy(module)
    monitor = library.ModuleMonitor(monitor_step_fn=lambda step: True)
    monitor.set_module(model)
    for name, metric in METRICS.items():
        monitor.add_activation_metric(name, metric)
    monitor.add_parameter_metric("norm", lambda p: p.norm())
    monitor.add_gradient_metric("norm", lambda g: g.norm())
    if compares:
        monitor.set_reference_module(reference)
        monitor.add_activation_difference_metric("l2", lambda a, b: (a - b).norm(dim=-1))

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        if compares and runs_reference:
            with torch.no_grad():
                reference(tokens)
        output: torch.Tensor = model(tokens)
        return output

    def after_backward() -> None:
        monitor.monitor_parameters()
        monitor.monitor_gradients()

    train = training_step(module, forward, tokens, after_backward)

    def step() -> None:
        monitor.begin_step((monitor.current_step or 0) + 1)
        train()
        monitor.end_step()
        assert len(monitor.get_step_metrics()) > 100

    return step


def measure(workload: Workload, script: str, rounds: int, *, compares: bool) -> list[Line]:
    """Both libraries, uncompiled and compiled."""
    lines = []
    for compiled in (False, True):
        way = "compiled" if compiled else "uncompiled"
        module = workload.model()
        model = torch.compile(module) if compiled else module
        steps = {f"no monitor, {way}": training_step(module, model, workload.tokens())}
        for name in LIBRARIES:
            library = importlib.import_module(name)
            make = functools.partial(monitored, library, workload, compiled=compiled)
            steps[f"{name}, {way}"] = make(compares=compares)
        if compares:
            steps[f"{LEFT_OUT}, {way}"] = make(compares=True, runs_reference=False)
        timings = interleave(steps, rounds)
        for variant, timing in timings.items():
            low, high = timing.interval
            peak = peak_memory(steps[variant])
            lines.append(Line(script, variant, timing.median * 1e3, timing.ratio, low, high, peak))
    return lines


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 20,
    quick: Annotated[bool, typer.Option(help="Few rounds.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Compare one script with either import."""
    workload = GPT_124M if torch.cuda.is_available() else GPT_SMALL
    rounds = 4 if quick else rounds
    lines = measure(workload, "statistics", rounds, compares=False)
    lines += measure(workload, "with a reference", rounds, compares=True)
    columns = ("script", "variant", "ms", "ratio", "95 % interval", "MB held")
    table = Table(*columns, title=workload.name)
    for line in lines:
        interval = f"{line.low:.2f} to {line.high:.2f}"
        numbers = f"{line.milliseconds:.1f}", f"{line.ratio:.2f}", interval
        table.add_row(line.script, line.variant, *numbers, f"{line.peak_bytes / 1e6:.0f}")
    Console(width=100).print(table)
    if save:
        report = {
            "workload": workload.name,
            "rounds": rounds,
            "environment": environment(),
            "lines": [asdict(line) for line in lines],
        }
        save_report("module-monitor", workload.device, report)


if __name__ == "__main__":
    typer.run(main)
