"""What comparing with a reference costs: activation differences, and the refined coordinate check.

    python -m benchmarks.reference [--rounds 40] [--quick] [--save]

Time is given as the number of plain compiled forward passes (without gradients) that a variant
adds to a plain compiled training step, in the same rounds. The arithmetic bound is one for the
branch, and one more of each checked module. torch-module-monitor (optional:
``pip install --no-deps torch-module-monitor``) does the same on the uncompiled model; what it adds
is taken against the uncompiled step. A second table is of ``reference_samples`` with an eighth of a
batch of eight.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import tmm
from benchmarks.parameters import peak_memory
from benchmarks.report import save_report
from benchmarks.timing import Timing, environment, interleave
from benchmarks.workloads import GPT_124M, GPT_SMALL, Workload, monitored_step, training_step

PLAIN, FORWARD, EAGER = "plain step", "plain forward", "uncompiled step"
DIFFERENCES, LINEAR, LEAVES = "differences, all modules", "RCC, linear layers", "RCC, all leaves"
PEER = "torch-module-monitor, RCC of all"
LINEAR_FORWARD = "forward of the linear layers"
ITEMS = 8  # of the batch of which one is compared
SAMPLED = {DIFFERENCES: "differences, an eighth", LEAVES: "RCC of all leaves, an eighth"}


@dataclass(frozen=True)
class Line:
    """What a variant adds to a step, in plain forwards, and the least that it could."""

    variant: str
    milliseconds: float
    added: float
    low: float
    high: float
    bound: float | None = None


def patterns(model: nn.Module) -> dict[str, str]:
    """Patterns that match the linear layers, and all modules without children."""
    named = list(model.named_modules())
    linear = [name for name, module in named if isinstance(module, nn.Linear)]
    leaves = [name for name, module in named if not list(module.children())]
    kinds = ((LINEAR, linear), (LEAVES, leaves))
    return {kind: f"({'|'.join(map(re.escape, names))})$" for kind, names in kinds}


def watched(workload: Workload, *rules: tmm.Rule, samples: int | None = None) -> Callable[[], None]:
    """A monitored training step that compares with the initial parameters."""
    module, tokens = workload.model(), workload.tokens()
    spec = tmm.Spec(*rules, reference="init", reference_samples=samples)
    model = tmm.instrument(torch.compile(module), spec)
    return monitored_step(model, training_step(module, model, tokens))


def variants(workload: Workload) -> dict[str, Callable[[], None]]:
    """All that takes turns."""
    tokens, module = workload.tokens(), workload.model()
    compiled = torch.compile(module)
    matching = patterns(module)
    linear = [
        (m, torch.randn(*_input_shape(workload, m)))
        for m in module.modules()
        if isinstance(m, nn.Linear)
    ]

    def forward() -> None:
        with torch.no_grad():
            compiled(tokens)

    def linear_forward() -> None:
        with torch.no_grad():
            for layer, x in linear:
                layer(x)

    steps: dict[str, Callable[[], None]] = {
        PLAIN: training_step(module, compiled, tokens),
        FORWARD: forward,
        LINEAR_FORWARD: linear_forward,
        DIFFERENCES: watched(workload, tmm.activation_difference("norm")),
        LINEAR: watched(workload, tmm.rcc(modules=matching[LINEAR])),
        LEAVES: watched(workload, tmm.rcc(modules=matching[LEAVES])),
    }
    uncompiled = workload.model()
    steps[EAGER] = training_step(uncompiled, uncompiled, tokens)
    if importlib.util.find_spec("torch_module_monitor") is not None:
        steps[PEER] = peer(workload, matching[LEAVES])
    return steps


def sampled_variants(workload: Workload) -> dict[str, Callable[[], None]]:
    """Comparisons of an eighth of a batch, and the plain program."""
    tokens, module = workload.tokens(), workload.model()
    compiled = torch.compile(module)
    leaves = patterns(module)[LEAVES]

    def forward() -> None:
        with torch.no_grad():
            compiled(tokens)

    # The metrics that some items estimate: a norm is none.
    rules = {DIFFERENCES: tmm.activation_difference("rms"), LEAVES: tmm.rcc(modules=leaves)}
    samples = workload.batch // ITEMS
    return {
        PLAIN: training_step(module, compiled, tokens),
        FORWARD: forward,
        **{SAMPLED[kind]: watched(workload, rule, samples=samples) for kind, rule in rules.items()},
    }


def _input_shape(workload: Workload, layer: nn.Linear) -> tuple[int, int, int]:
    return workload.batch, workload.config.context, layer.in_features


def peer(workload: Workload, leaves: str) -> Callable[[], None]:
    """The same by torch-module-monitor, of the modules that ``leaves`` matches."""
    from torch_module_monitor import (  # type: ignore[import-not-found,unused-ignore]
        ModuleMonitor,
        RefinedCoordinateCheck,
    )

    module, tokens = workload.model(), workload.tokens()
    reference = copy.deepcopy(module)
    monitor = ModuleMonitor(
        monitor_step_fn=lambda step: True, excluded_modules_regex=rf"^(?!{leaves}).*"
    )
    monitor.set_module(module)
    monitor.set_reference_module(reference)
    check = RefinedCoordinateCheck(monitor)

    def forward(tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            reference(tokens)
        output: torch.Tensor = module(tokens)
        check.refined_coordinate_check()
        return output

    step = training_step(module, forward, tokens)

    def run() -> None:
        monitor.begin_step((monitor.current_step or 0) + 1)
        step()
        monitor.end_step()
        assert len(monitor.get_step_metrics()) > 4 * workload.config.layers

    return run


def measure(steps: Mapping[str, Callable[[], None]], rounds: int) -> list[Line]:
    """All lines of the report."""
    timings = interleave(steps, rounds)
    forward = timings[FORWARD]
    if LINEAR_FORWARD not in steps:
        share = {SAMPLED[DIFFERENCES]: 1 / ITEMS, SAMPLED[LEAVES]: 2 / ITEMS}
        return _lines(timings, dict.fromkeys(share, PLAIN), share)
    linear = statistics.median(
        own / base
        for own, base in zip(timings[LINEAR_FORWARD].seconds, forward.seconds, strict=True)
    )
    bounds = {DIFFERENCES: 1.0, LINEAR: 1.0 + min(linear, 1.0), LEAVES: 2.0}
    return _lines(timings, {**dict.fromkeys(bounds, PLAIN), PEER: EAGER}, bounds)


def _lines(
    timings: Mapping[str, Timing], baselines: Mapping[str, str], bounds: Mapping[str, float]
) -> list[Line]:
    lines = [
        Line(name, timings[name].median * 1e3, 0.0, 0.0, 0.0)
        for name in (PLAIN, FORWARD, EAGER)
        if name in timings
    ]
    for name, baseline in baselines.items():
        if name in timings:
            added = added_forwards(timings[name], timings[baseline], timings[FORWARD])
            low, high = added.interval
            lines.append(Line(name, added.median * 1e3, added.ratio, low, high, bounds.get(name)))
    return lines


def added_forwards(own: Timing, baseline: Timing, forward: Timing) -> Timing:
    """What a variant adds to its baseline, round by round, against the forward passes."""
    added = (a - b for a, b in zip(own.seconds, baseline.seconds, strict=True))
    return Timing(tuple(added), forward.seconds)


def show(workload: Workload, lines: list[Line], caption: str) -> None:
    """Print the table."""
    table = Table("variant", "ms", "added forwards", "95 % interval", "bound", title=workload.name)
    table.caption = caption
    for line in lines:
        added, interval = f"{line.added:.2f}", f"{line.low:.2f} to {line.high:.2f}"
        bound = "" if line.bound is None else f"{line.bound:.2f}"
        shown = (added, interval, bound) if line.added else ("", "", "")
        table.add_row(line.variant, f"{line.milliseconds:.1f}", *shown)
    Console(width=100).print(table)


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 40,
    quick: Annotated[bool, typer.Option(help="Few rounds.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure what comparing with a reference adds to a training step."""
    workload = GPT_124M if torch.cuda.is_available() else GPT_SMALL
    steps = variants(workload)
    lines = measure(steps, 6 if quick else rounds)
    peaks = {kind: peak_memory(steps[kind]) for kind in (PLAIN, DIFFERENCES, LEAVES)}
    parameters = sum(p.nbytes for p in workload.model().parameters())
    caption = "; ".join(f"{kind}: {size / 1e6:.0f} MB" for kind, size in peaks.items())
    show(
        workload,
        lines,
        f"most bytes of tensors that a step holds: {caption}; and {parameters / 1e6:.0f} MB of"
        " reference parameters",
    )
    eighth = replace(
        workload, batch=ITEMS, name=re.sub(r"batch \d+", f"batch {ITEMS}", workload.name)
    )
    sampled = measure(sampled_variants(eighth), 6 if quick else rounds)
    show(eighth, sampled, f"one item of {ITEMS} is compared")
    report = {
        "workload": workload.name,
        "sampled": {"workload": eighth.name, "lines": [asdict(line) for line in sampled]},
        "rounds": rounds,
        "environment": environment(),
        "peak_bytes": peaks,
        "parameter_bytes": parameters,
        "lines": [asdict(line) for line in lines],
    }
    if save:
        save_report("reference", workload.device, report)


if __name__ == "__main__":
    typer.run(main)
