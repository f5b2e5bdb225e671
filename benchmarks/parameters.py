"""What eight statistics of every parameter and gradient of GPT-2 124M cost.

    python -m benchmarks.parameters [--rounds 20] [--quick] [--save]

``summarize_group`` and its values on the host, against a loop with ``.item()`` per statistic and
tensor, against torch-module-monitor (optional: ``pip install --no-deps torch-module-monitor``),
and against reading the same bytes once, which is ``torch.sum`` of each tensor. Random weights and
gradients. The quick loops take turns in many rounds, the slow ones in a few.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.report import save_report
from benchmarks.timing import Timing, environment, interleave
from tmm.core.metrics import builtin_reductions, finalize
from tmm.kernels.summarize.group import summarize_group

GROUPED, READ, LOOP = "summarize_group", "reading once (torch.sum)", "loop with .item()"
PEER = "torch-module-monitor"
FUNCTIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": torch.mean,
    "std": torch.std,
    "rms": lambda x: x.square().mean().sqrt(),
    "norm": torch.linalg.vector_norm,
    "mean_abs": lambda x: x.abs().mean(),
    "absmax": lambda x: x.abs().amax(),
    "min": torch.amin,
    "max": torch.amax,
}
"""The eight statistics as one would write them by hand."""


@dataclass(frozen=True)
class Line:
    """One line of the report: a ratio to reading the tensors once, in the same rounds."""

    variant: str
    milliseconds: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


def gpt2(device: str) -> nn.Module:
    """GPT-2 124M with random weights and gradients."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: nn.Module = GPT2LMHeadModel(GPT2Config())
    model.to(device)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def tensors_of(model: nn.Module) -> list[torch.Tensor]:
    """All parameters, then all gradients."""
    parameters = [parameter.detach() for parameter in model.parameters()]
    return parameters + [p.grad for p in model.parameters() if p.grad is not None]


def grouped(tensors: list[torch.Tensor]) -> Callable[[], None]:
    """All values by one call, read back once."""
    (reduction,) = builtin_reductions(tuple(FUNCTIONS), is_complex=False)

    def run() -> None:
        finalize(reduction, summarize_group(tensors, reduction.columns).cpu().numpy())

    return run


def loop(tensors: list[torch.Tensor]) -> Callable[[], None]:
    """Each value by itself, read back at once."""

    def run() -> None:
        for tensor in tensors:
            for function in FUNCTIONS.values():
                function(tensor).item()

    return run


def read(tensors: list[torch.Tensor]) -> Callable[[], None]:
    """Read every byte once."""

    def run() -> None:
        for tensor in tensors:
            tensor.sum()

    return run


def peer(model: nn.Module) -> Callable[[], None]:
    """The same by torch-module-monitor."""
    from torch_module_monitor import ModuleMonitor  # type: ignore[import-not-found,unused-ignore]

    monitor = ModuleMonitor(monitor_step_fn=lambda step: True)
    monitor.set_module(model)
    for name, function in FUNCTIONS.items():
        monitor.add_parameter_metric(name, function)
        monitor.add_gradient_metric(name, function)

    def run() -> None:
        monitor.begin_step((monitor.current_step or 0) + 1)
        with torch.no_grad():
            monitor.monitor_parameters()
            monitor.monitor_gradients()
        monitor.end_step()
        assert len(monitor.get_step_metrics()) >= len(FUNCTIONS) * len(tensors_of(model))

    return run


def peak_memory(function: Callable[[], object]) -> int:
    """Most bytes of tensors that a call holds at a time, beyond what was there before.

    What the kernel of a CPU allocates by itself is not among them; see ``kernel_memory``.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    allocations = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, size in sorted(allocations, key=lambda allocation: allocation[0]):
        held += size
        peak = max(peak, held)
    return peak


def kernel_memory(tensors: list[torch.Tensor]) -> int:
    """Bytes of the rows of chunks in ``host.cpp``: 17 doubles per 32768 elements."""
    if torch.cuda.is_available():
        return 0
    return sum(math.ceil(tensor.numel() / 2**15) * 17 * 8 for tensor in tensors)


def line(variant: str, timing: Timing, note: str = "") -> Line:
    """A line of the report from the rounds of a variant."""
    low, high = timing.interval
    return Line(variant, timing.median * 1e3, timing.ratio, low, high, note)


def measure(model: nn.Module, rounds: int, slow_rounds: int) -> list[Line]:
    """All lines of the report."""
    tensors = tensors_of(model)
    quick = {READ: read(tensors), GROUPED: grouped(tensors)}
    slow = {READ: quick[READ], LOOP: loop(tensors)}
    if importlib.util.find_spec("torch_module_monitor") is not None:
        slow[PEER] = peer(model)
    in_quick = interleave(quick, rounds)
    in_slow = interleave(slow, slow_rounds, warm_up=1)
    lines = [
        line(READ, in_quick[READ]),
        line(GROUPED, in_quick[GROUPED], "goal: ratio <= 1.3"),
        line(LOOP, in_slow[LOOP], "goal: >= 10 x summarize_group"),
    ]
    if PEER in in_slow:
        version = importlib.metadata.version(PEER)
        lines.append(line(PEER, in_slow[PEER], f"{version}; goal: >= 10 x summarize_group"))
    else:
        lines.append(Line(PEER, None, note="not installed"))
    return lines


def show(lines: list[Line], title: str, caption: str) -> None:
    """Print the table."""
    table = Table("variant", "ms", "x reading", "95 % interval", "note", title=title)
    table.caption = caption
    for one in lines:
        if one.milliseconds is None:
            table.add_row(one.variant, "", "", "", one.note)
            continue
        interval = f"{one.low:.2f} to {one.high:.2f}"
        table.add_row(
            one.variant, f"{one.milliseconds:.1f}", f"{one.ratio:.2f}", interval, one.note
        )
    Console(width=110).print(table)


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 40,
    slow_rounds: Annotated[int, typer.Option(help="Rounds of the slow loops.")] = 5,
    quick: Annotated[bool, typer.Option(help="Few rounds.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 keeps its own number.")] = 0,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure eight statistics of all parameters and gradients."""
    if threads:
        torch.set_num_threads(threads)
    if quick:
        rounds, slow_rounds = 8, 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = gpt2(device)
    tensors = tensors_of(model)
    lines = measure(model, rounds, slow_rounds)
    size = sum(t.nbytes for t in tensors)
    extra = peak_memory(grouped(tensors)) + kernel_memory(tensors)
    caption = f"extra memory {extra / 1e6:.1f} MB = {extra / size:.2%} of {size / 1e6:.0f} MB"
    show(lines, f"{len(FUNCTIONS)} statistics of {len(tensors)} tensors of GPT-2 124M", caption)
    report = {
        "workload": "GPT-2 124M, float32, all parameters and gradients",
        "statistics": list(FUNCTIONS),
        "tensors": len(tensors),
        "bytes": size,
        "extra_bytes": extra,
        "rounds": {"quick": rounds, "slow": slow_rounds},
        "environment": environment(),
        "lines": [asdict(one) for one in lines],
    }
    if save:
        save_report("parameters", device, report)


if __name__ == "__main__":
    typer.run(main)
