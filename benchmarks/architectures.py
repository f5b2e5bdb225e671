"""What five metrics of all modules cost on other models, by each lowering.

    python -m benchmarks.architectures [--rounds 40] [--only NAME] [--quick] [--save]

MLP, GPT, ResNet, vision transformer, and a chain of small modules. Ratios of a training step that
is monitored to one of the plain compiled program, in turns, each behind one of the same program, as
in a training; each lowering, and the plain program, has a copy of the model. All weights and data
are random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from torch import nn

import tmm
from benchmarks.compiled import count_compiled, kernel_launches
from benchmarks.parameters import peak_memory
from benchmarks.reading import outputs_of, parameters_of, reader, size_of
from benchmarks.report import Line, finish, timed, with_goal
from benchmarks.timing import interleave
from benchmarks.workloads import (
    FIVE_METRICS,
    Workload,
    monitored_step,
    next_token_loss,
    training_step,
    usual_workload,
)
from tmm.kernels.fused.choose_lowering import Lowering

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
CLASSES = 10
LOWERINGS: tuple[Lowering, ...] = ("auto", "fused", "operator")
TOY = "toy MLP"


@dataclass(frozen=True)
class Task:
    """A model, its inputs and its loss, which gets the output and the inputs."""

    name: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    loss: Loss
    goal: float | None = None


class Residual(nn.Module):
    """Two convolutions around which the input passes; the first may halve the image."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, channels, height, width) to (batch, out, height / stride, ...)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: torch.Tensor = self.relu(y + self.shortcut(x))
        return result


class VisionTransformer(nn.Module):
    """Patches of 4 x 4 pixels through the layers of ``torch.nn``."""

    def __init__(self, width: int, layers: int, size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, (size // 4) ** 2, width) * 0.02)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(layers)
            )
        )
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (batch, 3, size, size) to (batch, classes)."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        result: torch.Tensor = self.head(self.layers(tokens).mean(1))
        return result


def mlp(width: int, layers: int) -> nn.Module:
    """Linear layers with ReLUs between."""
    hidden = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, CLASSES))


def resnet(channels: int) -> nn.Module:
    """Four stages of two blocks each, twice as wide and half as large at each of three."""
    widths = [channels * 2 ** (i // 2) for i in range(8)]
    blocks = [
        Residual(widths[max(i - 1, 0)], width, 2 if i in (2, 4, 6) else 1)
        for i, width in enumerate(widths)
    ]
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))
    return nn.Sequential(nn.Conv2d(3, channels, 3, 1, 1), *blocks, *end)


def classify(logits: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the classes 0, 1, 2 and so on, one after the other."""
    targets = torch.arange(len(logits), device=logits.device) % CLASSES
    return nn.functional.cross_entropy(logits.float(), targets)


def tasks(*, toy: bool) -> list[Task]:
    """All models, on the device of the usual workload."""
    workload = usual_workload(toy=toy)

    def task(
        name: str, model: Callable[[], nn.Module], *shape: int, goal: float | None = None
    ) -> Task:
        return Task(
            *(name, lambda: seeded(model, workload), lambda: noise(workload, *shape), classify),
            goal=goal,
        )

    if toy:
        return [task(TOY, lambda: mlp(8, 2), 4, 8)]
    size, scale = (64, 16) if workload.device == "cuda" else (32, 1)
    batch = 16 * scale
    return [
        task("MLP, 8 layers of 1,024", lambda: mlp(1024, 8), 4 * batch, 1024, goal=1.02),
        Task(workload.name, workload.model, workload.tokens, next_token_loss, goal=1.015),
        task("ResNet, 8 blocks", lambda: resnet(32), batch, 3, size, size, goal=1.02),
        task(
            "vision transformer, 6 layers",
            lambda: VisionTransformer(192, 6, size),
            batch,
            3,
            size,
            size,
        ),
        task("chain of 200 small layers", lambda: mlp(64, 100), 16 * batch, 64, goal=1.1),
    ]


def seeded(model: Callable[[], nn.Module], workload: Workload) -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return model().to(workload.device, workload.dtype)


def noise(workload: Workload, *shape: int) -> torch.Tensor:
    """The same inputs each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(workload.device, workload.dtype)


def measure(task: Task, rounds: int) -> tuple[list[Line], dict[str, object]]:
    """Lines of one model, and what else the report keeps of it."""
    inputs = task.inputs()
    module = task.model()
    outputs = outputs_of(module, inputs)
    plain = training_step(module, torch.compile(module), inputs, loss=task.loss)
    steps, monitors = {"plain": plain}, {}
    for lowering in LOWERINGS:
        own = task.model()
        model = tmm.instrument(
            torch.compile(own), tmm.Spec(tmm.activation(*FIVE_METRICS)), lowering=lowering
        )
        monitors[lowering] = tmm.monitor(model)
        step = training_step(own, model, inputs, loss=task.loss)
        steps[lowering] = monitored_step(model, step)
    watched = steps["auto"]
    compiled = {}
    for name, step in steps.items():
        with count_compiled() as found:
            step()
        compiled[name] = found.numbers()
    timings = interleave({**steps, "read": reader(outputs)}, rounds, settle=1)
    parameters = size_of(parameters_of(module))
    before, after = peak_memory(plain), peak_memory(watched)
    values = len(monitors["auto"].get_step_metrics())
    by_lowering = {name: timed(f"{task.name}: {name}", timings[name]) for name in LOWERINGS}
    by_lowering["auto"] = with_goal(by_lowering["auto"], at_most=task.goal)
    lines = [
        timed(f"{task.name}: plain compiled", timings["plain"], f"{values} values"),
        *by_lowering.values(),
        timed(f"{task.name}: reading activations", timings["read"]),
        Line(
            f"{task.name}: peak memory",
            ratio=(parameters + after) / (parameters + before),
            at_most=None if task.name == TOY else 1.02,
        ),
    ]
    details = {
        "modules": len(list(module.modules())),
        "values": values,
        "read_bytes": size_of(outputs),
        "compiled": compiled,
        "kernel_launches": {"plain": kernel_launches(plain), "auto": kernel_launches(watched)},
    }
    return lines, details


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 40,
    only: Annotated[str, typer.Option(help="Models whose names begin so.")] = "",
    quick: Annotated[bool, typer.Option(help="Few rounds, the first two models.")] = False,
    toy: Annotated[bool, typer.Option(help="A toy model: only shows that it runs.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure five metrics of all modules on several models."""
    chosen = [task for task in tasks(toy=toy) if task.name.startswith(only)]
    lines: list[Line] = []
    details: dict[str, object] = {}
    for task in chosen[:2] if quick else chosen:
        found, details[task.name] = measure(task, 3 if toy else 12 if quick else rounds)
        lines += found
    device = usual_workload(toy=toy).device
    finish("architectures", device, lines, save=save, title="other models", details=details)


if __name__ == "__main__":
    typer.run(main)
