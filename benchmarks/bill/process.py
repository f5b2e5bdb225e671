"""One training of 20 steps, in a process of its own, which prints what it cost as JSON.

    python -m benchmarks.bill.process GPT 'tmm, every=10' [--steps 20] [--toy]

The clock starts when torch is imported and the model built, so that it has what a variant imports,
what it does to the model, and all compiling.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import typer

from benchmarks.bill.tasks import Task, tasks
from benchmarks.bill.variants import VARIANTS, Attached, Values, Variant
from benchmarks.workloads import training_step

STEPS = 20


@dataclass(frozen=True)
class Run:
    """When each step had ended, in seconds after the start, and the values of monitored steps."""

    ends: tuple[float, ...]
    values: tuple[Values, ...]
    attached: Attached


def train(task: Task, variant: Variant, steps: int, backend: str = "inductor") -> Run:
    """Attach a variant to a model, and train that."""
    model, tokens = task.model(), task.workload.tokens()
    started = time.perf_counter()
    attached = variant.attach(model, task.compile, backend, variant.every)
    step = training_step(model, attached.forward, tokens, optimizer=attached.optimizer)
    ends, values = [], []
    for number in range(steps):
        attached.begin(number)
        step()
        values.append(attached.end(number))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter() - started)
    return Run(tuple(ends), tuple(values), attached)


def peak_bytes() -> int:
    """The most memory that this process has held; on a GPU, the most that it has held there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bill(task: Task, variant: Variant, steps: int) -> dict[str, Any]:
    """What a training cost, and what was compiled for it."""
    torch._logging.set_logs(inductor_metrics=True)  # without which bytes are not counted
    run = train(task, variant, steps)
    peak = peak_bytes()
    from benchmarks.compiled import compiled_so_far  # which imports the compiler

    return {
        "first_step": run.ends[0],
        "all_steps": run.ends[-1],
        "ends": run.ends,
        "peak_bytes": peak,
        "values": sum(map(len, run.values)),
        **asdict(compiled_so_far()),
    }


def main(
    task: Annotated[str, typer.Argument(help="A name of tasks.")],
    variant: Annotated[str, typer.Argument(help="A name of VARIANTS.")],
    steps: Annotated[int, typer.Option(help="Steps of the training.")] = STEPS,
    toy: Annotated[bool, typer.Option(help="A toy model.")] = False,
) -> None:
    """Train, and print what it cost as the last line."""
    (chosen,) = (one for one in VARIANTS if one.name == variant)
    print(json.dumps(bill(tasks(toy=toy)[task], chosen, steps)))


if __name__ == "__main__":
    typer.run(main)
