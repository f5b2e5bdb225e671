"""What entropy and the largest logit of all heads cost, by the length of the sequence.

    python -m benchmarks.attention [--lengths 512,1024,...] [--quick] [--save]

Compared with one call of torch's ``scaled_dot_product_attention``, which computes the attention
itself, and with torch-module-monitor's function (optional: ``pip install --no-deps
torch-module-monitor``), where the machine has the memory. Memory is what a process of its own grows
by at most beyond its inputs (on a GPU: what is allocated at most).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.parameters import peak_memory
from benchmarks.report import save_report
from benchmarks.timing import environment, interleave
from tmm.kernels.ops import summarize_attention

HEADS, CHANNELS = 4, 64
SDPA, OURS, PEER = "attention", "tmm", "torch-module-monitor"
_PEER_COPIES = 6  # matrices of all heads that torch-module-monitor holds, and some room


@dataclass(frozen=True)
class Line:
    """One length: milliseconds of each, ratios to one attention, and megabytes."""

    length: int
    milliseconds: dict[str, float]
    ratio: float
    interval: tuple[float, float]
    peer_ratio: float | None
    megabytes: dict[str, float]


def device() -> str:
    """Where it runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def variants(length: int) -> dict[str, Callable[[], object]]:
    """What takes turns at one length."""
    dtype = torch.bfloat16 if device() == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, HEADS, length, CHANNELS, generator=generator).to(device(), dtype)
        for _ in range(3)
    )
    found: dict[str, Callable[[], object]] = {
        SDPA: lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
        OURS: lambda: summarize_attention(
            *(query, key, None, True, None, None, False, "entropy,max_logit")
        ),
    }
    needed = _PEER_COPIES * HEADS * length**2 * query.element_size()
    if importlib.util.find_spec("torch_module_monitor") is not None and needed < _memory():
        found[PEER] = peer(query, key, value)
    return found


def peer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Callable[[], object]:
    """torch-module-monitor's entropy of the same heads."""
    from torch_module_monitor import (  # type: ignore[import-not-found,unused-ignore]
        ModuleMonitor,
        monitor_scaled_dot_product_attention,
    )

    monitor = ModuleMonitor(monitor_step_fn=lambda step: True)
    monitor.set_module(torch.nn.Identity())

    def run() -> None:
        monitor.begin_step((monitor.current_step or 0) + 1)
        monitor_scaled_dot_product_attention(monitor, "a", query, key, value, is_causal=True)
        monitor.end_step()

    return run


def _memory() -> int:
    """Bytes that are free."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return int(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def growth(length: int, name: str) -> float:
    """Megabytes that one call takes, in a process of its own."""
    if torch.cuda.is_available():
        return peak_memory(variants(length)[name]) / 1e6
    code = f"from benchmarks.attention import report; report({length}, {name!r})"
    answer = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout
    return float(answer.split()[-1])


def report(length: int, name: str) -> None:
    """Print by how many megabytes the peak of this process grows in a call (Linux)."""
    variants(16)[name]()  # loads and compiles
    call = variants(length)[name]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak until now
    before = _kilobytes("VmRSS")
    call()
    print((_kilobytes("VmHWM") - before) * 1024 / 1e6)


def _kilobytes(entry: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry))


def measure(length: int, rounds: int) -> Line:
    """Time and memory at one length."""
    calls = variants(length)
    timings = interleave({n: lambda c=c: void(c) for n, c in calls.items()}, rounds, 1)  # type: ignore[misc]
    return Line(
        length,
        {name: timing.median * 1e3 for name, timing in timings.items()},
        timings[OURS].ratio,
        timings[OURS].interval,
        timings[PEER].median / timings[OURS].median if PEER in timings else None,
        {name: growth(length, name) for name in calls},
    )


def void(call: Callable[[], object]) -> None:
    """Call it and forget the result."""
    call()


def show(lines: list[Line]) -> None:
    """Print the table."""
    columns = ("length", "attention ms", "tmm ms", "ratio", "95 %", "monitor", "MB: tmm", "monitor")
    table = Table(*columns, title=f"{HEADS} heads of {CHANNELS} channels, causal, {device()}")
    for line in lines:
        low, high = line.interval
        slower = "no memory" if line.peer_ratio is None else f"{line.peer_ratio:.0f} x slower"
        table.add_row(
            *(str(line.length), f"{line.milliseconds[SDPA]:.2f}"),
            *(f"{line.milliseconds[OURS]:.2f}", f"{line.ratio:.2f}", f"{low:.2f} to {high:.2f}"),
            *(slower, f"{line.megabytes[OURS]:.1f}"),
            f"{line.megabytes[PEER]:.0f}" if PEER in line.megabytes else "",
        )
    first, last = lines[0], lines[-1]
    slope = (last.megabytes[OURS] - first.megabytes[OURS]) / (last.length - first.length) * 1e3
    table.caption = f"memory grows by {slope:.2f} kB per position"
    Console(width=110).print(table)


def main(
    lengths: Annotated[
        str, typer.Option(help="Lengths, separated by commas.")
    ] = "512,1024,2048,4096,8192,16384",
    quick: Annotated[bool, typer.Option(help="Short lengths, few rounds.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure what the statistics of attention cost."""
    asked = [512, 1024] if quick else [int(length) for length in lengths.split(",")]
    lines = [measure(length, 5 if quick else max(5, 30_000 // length)) for length in asked]
    show(lines)
    if save:
        content = {"environment": environment(), "lines": [asdict(line) for line in lines]}
        save_report("attention", device(), content)


if __name__ == "__main__":
    typer.run(main)
