"""How the time that monitoring adds grows: with sites, metrics, layers and the batch.

    python -m benchmarks.growth [--rounds 30] [--quick] [--axis sites] [--save]

- sites: a chain of 10 to 1,000 linear layers and ReLUs, five metrics of each;
- metrics: the usual GPT with 1, 5 and 12 metrics of each module;
- layers: a narrow GPT of 4 to 64 layers, compiled block by block, which share one graph;
- batch: the usual GPT with 1, 2 and 4 times a quarter of its batch.

At each point monitored and plain steps take turns. A line is fitted to what is added; its slope has
a 95 % interval from resampling the rounds.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated

import numpy as np
import torch
import typer
from torch import nn

import tmm
from benchmarks.report import Line, finish, timed
from benchmarks.timing import Timing, interleave
from benchmarks.workloads import (
    FIVE_METRICS,
    GPT_SMALL,
    Workload,
    monitored_step,
    next_token_loss,
    training_step,
    usual_workload,
)
from tmm.core.metrics import METRICS
from tmm.examples.gpt import GPTConfig

WIDTH, ROWS = 64, 256  # of the chain of layers, and its batch
RESAMPLES = 2000
Step = Callable[[], None]


@dataclass(frozen=True)
class Point:
    """One place on an axis: a plain step, and one that is monitored."""

    position: int
    plain: Step
    watched: Step


@dataclass(frozen=True)
class Fit:
    """A line through what is added, in microseconds per unit and at zero, with 95 % intervals."""

    slope: float
    slope_interval: tuple[float, float]
    intercept: float
    intercept_interval: tuple[float, float]


def sites(sizes: Sequence[int]) -> Iterator[Point]:
    """Chains of so many modules, each of which is a site."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    for size in sizes:
        torch.manual_seed(0)
        layers = [nn.ReLU() if index % 2 else nn.Linear(WIDTH, WIDTH) for index in range(size)]
        yield pair(size, nn.Sequential(*layers).to(device), inputs, FIVE_METRICS, _mean_square)


def _mean_square(output: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def metrics(workload: Workload, counts: Sequence[int]) -> Iterator[Point]:
    """The first of the built-in metrics; five are the usual ones."""
    for count in counts:
        chosen = FIVE_METRICS if count == len(FIVE_METRICS) else tuple(METRICS)[:count]
        yield pair(count, workload.model(), workload.tokens(), chosen)


def layers(depths: Sequence[int], workload: Workload) -> Iterator[Point]:
    """Narrow GPTs whose blocks are compiled one by one."""
    for depth in depths:
        config = GPTConfig(vocabulary=64, context=64, layers=depth, heads=4, width=64)
        narrow = replace(workload, config=config, batch=4)
        steps = []
        for watches in (False, True):
            module = narrow.model()
            for block in module.h:
                block.compile()
            steps.append(step_of(module, module, narrow.tokens(), watches=watches))
        yield Point(depth, *steps)


def step_of(module: nn.Module, model: nn.Module, inputs: torch.Tensor, *, watches: bool) -> Step:
    """A training step, monitored or not."""
    if watches:
        model = tmm.instrument(model, tmm.Spec(tmm.activation(*FIVE_METRICS)))
        return monitored_step(model, training_step(module, model, inputs))
    return training_step(module, model, inputs)


def batches(workload: Workload, parts: Sequence[int]) -> Iterator[Point]:
    """Batches of so many quarters of the usual one."""
    for part in parts:
        batch = max(1, workload.batch * part // 4)
        resized = replace(workload, batch=batch)
        yield pair(batch, resized.model(), resized.tokens(), FIVE_METRICS)


def pair(
    position: int,
    module: nn.Module,
    inputs: torch.Tensor,
    metrics: Sequence[str],
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = next_token_loss,
) -> Point:
    """Plain and monitored steps of one module; compiled for these very shapes."""
    plain = torch.compile(module, dynamic=False)
    watched = tmm.instrument(
        torch.compile(module, dynamic=False), tmm.Spec(tmm.activation(*metrics))
    )
    return Point(
        position,
        training_step(module, plain, inputs, loss=loss),
        monitored_step(watched, training_step(module, watched, inputs, loss=loss)),
    )


def fit(positions: Sequence[int], added: Sequence[Sequence[float]]) -> Fit:
    """The line of least squares through the medians of what is added, in seconds, at each place."""
    generator = np.random.default_rng(0)
    samples = [np.asarray(rounds) * 1e6 for rounds in added]

    def line(values: Sequence[float]) -> tuple[float, float]:
        slope, intercept = np.polyfit(positions, values, 1)
        return float(slope), float(intercept)

    resampled = np.array(
        [
            line([float(np.median(generator.choice(rounds, len(rounds)))) for rounds in samples])
            for _ in range(RESAMPLES)
        ]
    )
    low, high = np.quantile(resampled, (0.025, 0.975), axis=0)
    slope, intercept = line([float(np.median(rounds)) for rounds in samples])
    return Fit(slope, (float(low[0]), float(high[0])), intercept, (float(low[1]), float(high[1])))


def measure(axis: str, points: Iterator[Point], rounds: int) -> tuple[list[Line], Fit]:
    """Lines of an axis, the last of which tells the slope."""
    lines: list[Line] = []
    positions: list[int] = []
    added: list[list[float]] = []
    for point in points:
        timings = interleave({"plain": point.plain, "watched": point.watched}, rounds)
        watched = timings["watched"]
        positions.append(point.position)
        added.append(watched.added)
        lines.append(timed(f"{axis}: {point.position}", watched, _note(watched)))
        torch.compiler.reset()  # the next model is another one of the same class
    found = fit(positions, added)
    low, high = found.slope_interval
    note = f"{found.slope:.1f} us per unit ({low:.1f} to {high:.1f}), {found.intercept:.0f} at 0"
    return [*lines, Line(f"{axis}: slope", note=note)], found


def _note(timing: Timing) -> str:
    return f"adds {statistics.median(timing.added) * 1e6:.0f} us"


def axes(workload: Workload, *, quick: bool, toy: bool) -> dict[str, Iterator[Point]]:
    """The points of each axis; made one by one, as they take memory."""
    if toy:
        return {"sites": sites((4, 8)), "metrics": metrics(workload, (1, 5))}
    narrow = workload if workload.device == "cuda" else GPT_SMALL
    if quick:
        return {"sites": sites((10, 30, 100)), "layers": layers((4, 8, 16), narrow)}
    return {
        "sites": sites((10, 30, 100, 300, 1000)),
        "layers": layers((4, 8, 16, 32, 64), narrow),
        "metrics": metrics(workload, (1, 5, 12)),
        "batch": batches(workload, (1, 2, 4)),
    }


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 30,
    quick: Annotated[
        bool, typer.Option(help="Few rounds, sites and layers only, fewer of them.")
    ] = False,
    toy: Annotated[bool, typer.Option(help="A toy model: only shows that it runs.")] = False,
    axis: Annotated[str, typer.Option(help="One axis only.")] = "",
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure how the added time grows."""
    workload = usual_workload(toy=toy)
    chosen = axes(workload, quick=quick, toy=toy)
    if axis and axis not in chosen:
        raise typer.BadParameter(f"{axis!r} is not one of {', '.join(chosen)}")
    measured = {
        name: measure(name, points, 4 if toy else 12 if quick else rounds)
        for name, points in chosen.items()
        if axis in {"", name}
    }
    finish(
        "growth",
        workload.device,
        list(itertools.chain.from_iterable(lines for lines, _ in measured.values())),
        save=save,
        title=f"growth: {workload.name}",
        fits={name: asdict(found) for name, (_, found) in measured.items()},
    )


if __name__ == "__main__":
    typer.run(main)
