"""The parts of a run, in the order of their value: a limit of time cuts off the last ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.on_gpu import costs, truth
from benchmarks.on_gpu.findings import Finding
from benchmarks.on_gpu.subjects import Subject
from tmm.kernels.kernel_registry import OPERATIONS, describe


@dataclass(frozen=True)
class Part:
    """A question to a device. It runs in a process of its own, for ``most`` seconds at most.

    It begins only where ``least`` seconds are left.
    """

    name: str
    does: str
    run: Callable[[Subject, Path], Iterator[Finding]]
    least: float = 10.0
    most: float = 180.0


def machine(subject: Subject) -> Iterator[Finding]:
    """What the device is, and which kernels serve it."""
    device = torch.device(subject.device)
    if subject.is_gpu:
        found = torch.cuda.get_device_properties(device)
        text = f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB"
        yield Finding("device", text)
    yield Finding("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    for operation in OPERATIONS:
        yield Finding(f"kernel of {operation}", describe(operation, device.type))


PARTS = (
    Part("machine", "The device, and the kernels that serve it.", lambda s, _: machine(s), 5, 60),
    Part(
        "kernels",
        "Each kernel on the device, against its definition in float64.",
        lambda subject, _: truth.kernels(subject),
        most=120,
    ),
    Part(
        "models",
        "Every row of one step, against plain eager hooks on the device.",
        lambda subject, _: truth.models(subject),
        most=120,
    ),
    Part(
        "costs",
        "Monitored steps of a GPT, as ratios to the plain compiled step; launches and memory.",
        lambda subject, _: costs.costs(subject),
        least=30,
        most=240,
    ),
    Part(
        "CUDA graphs",
        "The same under mode='reduce-overhead'.",
        lambda subject, _: costs.cuda_graphs(subject),
        least=30,
    ),
    Part("trace", "Where the time of a monitored step goes.", costs.trace, least=20, most=120),
)
"""Truth before cost, and cost before what explains it."""


def part_named(name: str) -> Part:
    """The part of that name."""
    (found,) = (part for part in PARTS if part.name == name)
    return found
