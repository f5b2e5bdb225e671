"""What monitored steps cost on a device: time, launches, memory, with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import tmm
from benchmarks.compiled import kernel_launches
from benchmarks.everything import ACTIVATIONS, EVERYTHING, SPECS, Watched
from benchmarks.on_gpu.findings import Finding
from benchmarks.on_gpu.subjects import Subject, zoo
from benchmarks.on_gpu.truth import compared_with_hooks, compiler, exact_products
from benchmarks.parameters import peak_memory
from benchmarks.timing import Timing, interleave
from benchmarks.workloads import Workload, training_step

PLAIN = "plain compiled"
OFF = "steps in between, everything asked"
UNREAD = "activations, each step, values left where they are"
_ROUNDS = 30


@dataclass
class Programs:
    """The plain compiled step of a GPT, and monitored ones of the same module."""

    workload: Workload
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of ``torch.compile``."""

    def __post_init__(self) -> None:
        self.module = self.workload.model()
        self.tokens = self.workload.tokens()
        self.plain = training_step(self.module, self._compiled(), self.tokens)

    def _compiled(self) -> torch.nn.Module:
        return compiler(self.options)(self.module)

    def watched(self, what: str) -> Watched:
        """Steps that are monitored as one of ``benchmarks.everything``."""
        model = tmm.instrument(self._compiled(), SPECS[what])
        monitor = tmm.monitor(model)
        optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-4)
        if SPECS[what].measures("update"):
            monitor.watch(optimizer)
        train = training_step(self.module, model, self.tokens, optimizer=optimizer)
        return Watched(monitor, train, bare=train)


def unread(watched: Watched) -> Callable[[], None]:
    """Monitored steps whose values nobody asks for in the step."""

    def run() -> None:
        watched.step += 2
        with watched.monitor.step(watched.step):
            watched.train()

    return run


def costs(subject: Subject) -> Iterator[Finding]:
    """Times first, as ratios to the plain step in the same rounds; then launches and memory."""
    programs = Programs(subject.workload(), subject.options)
    rounds = 3 if subject.toy else _ROUNDS
    activations = programs.watched(ACTIVATIONS)
    steps: dict[str, Callable[[], None]] = {
        PLAIN: programs.plain,
        ACTIVATIONS: lambda: activations.run(monitored=True),
    }
    yield from timed(interleave({**steps, UNREAD: unread(activations)}, rounds))
    yield from _launches_and_memory(steps)
    everything = programs.watched(EVERYTHING)
    steps = {PLAIN: programs.plain, EVERYTHING: lambda: everything.run(monitored=True)}
    yield from timed(interleave({**steps, OFF: lambda: everything.run(monitored=False)}, rounds))
    yield from _launches_and_memory(steps)


def timed(timings: Mapping[str, Timing]) -> Iterator[Finding]:
    """A finding for each program that took turns with the first one."""
    for name, timing in timings.items():
        low, high = timing.interval
        numbers = {
            "milliseconds": timing.median * 1e3,
            "ratio": timing.ratio,
            "low": low,
            "high": high,
        }
        text = f"{timing.median * 1e3:.2f} ms, {timing.ratio:.4f} ({low:.4f} to {high:.4f})"
        yield Finding(f"time: {name}", text, None, numbers)


def _launches_and_memory(steps: Mapping[str, Callable[[], None]]) -> Iterator[Finding]:
    launches = {name: kernel_launches(step) for name, step in steps.items()}
    memory = {name: peak_memory(step) for name, step in steps.items()}
    for name in steps:
        added = launches[name] - launches[PLAIN]
        text = f"{launches[name]}, {added:+d} to {PLAIN}"
        yield Finding(f"launches: {name}", text, None, {"launches": launches[name]})
        ratio = memory[name] / max(memory[PLAIN], 1)
        text = f"{memory[name] / 1e6:.1f} MB beyond what stays, {ratio:.4f} of {PLAIN}"
        yield Finding(f"peak memory: {name}", text, None, {"bytes": memory[name]})


def cuda_graphs(subject: Subject) -> Iterator[Finding]:
    """``mode="reduce-overhead"``: still true, and what it costs."""
    options = subject.options or {"mode": "reduce-overhead"}
    with exact_products():
        for model in zoo(toy=subject.toy)[:2]:
            yield compared_with_hooks(
                *(model, subject, "reduce-overhead"),
                compiler(options),
            )
    torch._dynamo.reset()
    programs = Programs(subject.workload(), options)
    activations = programs.watched(ACTIVATIONS)
    steps = {PLAIN: programs.plain, ACTIVATIONS: lambda: activations.run(monitored=True)}
    yield from timed(interleave(steps, 3 if subject.toy else _ROUNDS, warm_up=5))
    yield from _launches_and_memory(steps)


def trace(subject: Subject, folder: Path) -> Iterator[Finding]:
    """A profile of three monitored steps: where the time goes, and a trace to look at."""
    programs = Programs(subject.workload(), subject.options)
    watched = programs.watched(ACTIVATIONS)
    for _ in range(3):
        watched.run(monitored=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if subject.is_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(3):
            watched.run(monitored=True)
        if subject.is_gpu:
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(folder / "trace.json.gz"))
    key = "self_device_time_total" if subject.is_gpu else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in events)
    yield Finding("trace", "trace.json.gz, of three steps", None, {"microseconds": total})
    for event in events[:15]:
        share = getattr(event, key) / max(total, 1)
        text = (
            f"{getattr(event, key) / 3e3:.2f} ms a step, {share:.1%}, {event.count / 3:.0f} calls"
        )
        yield Finding(f"kernel: {event.key[:100]}", text, None, {"share": share})
