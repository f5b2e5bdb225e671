"""Is the cause of a planted fault named first? And are healthy trainings left in peace?

    python -m benchmarks.diagnosis [--quick] [--only FAULT,...] [--held-out] [--save]

Each fault is planted in each of four small models with three seeds and recorded as
``tmm.default_spec()`` says, on each step (for attention with a rule for it); tmm then says what is
wrong. It scores where the first true statement (kind, place and step) stands, and what is said of
30 healthy trainings. ``--held-out`` takes other seeds, widths, models and every third step.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.diagnosis.faults import FAULTS, NOT_TOLD, Fault
from benchmarks.diagnosis.healthy import healthy
from benchmarks.diagnosis.models import HELD_OUT, MODELS
from benchmarks.diagnosis.scoring import Said, rank, says
from benchmarks.diagnosis.training import Training, train
from benchmarks.report import Line, finish

SHOWN = 3


@dataclass(frozen=True)
class Outcome:
    """What was said of a training with a fault, and the place of the first true statement."""

    fault: str
    model: str
    seed: int
    said: tuple[Said, ...]
    place: int | None


def plantings(
    *, quick: bool, held_out: bool, only: tuple[str, ...] = ()
) -> Iterator[tuple[Fault, Training]]:
    """The trainings with a fault in each."""
    models = MODELS | HELD_OUT if held_out else MODELS
    for place, fault in enumerate(FAULTS.values()):
        if only and fault.name not in only:
            continue
        names = [name for name in models if name not in fault.without]
        if quick:
            names = [names[place % len(names)]]
        elif held_out:  # the models of the others take turns
            known = [name for name in names if name in MODELS]
            names = [known[place % len(known)], *(name for name in names if name in HELD_OUT)]
        for name in names:
            for seed in (3,) if held_out else (0,) if quick else (0, 1, 2):
                torch.manual_seed(seed)
                if held_out and name in MODELS:
                    task = models[name](seed, width=48)
                    task.lr *= 0.5
                else:
                    task = models[name](seed)
                training = Training(task, seed, attention=fault.attention)
                if held_out:
                    training.steps, training.every = training.steps + 20, 2
                fault.plant(training)
                yield fault, training


def outcome(fault: Fault, training: Training) -> Outcome:
    """Train, and ask what was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        said = says(train(training, Path(folder)))
    place = rank(said, fault, training)
    return Outcome(fault.name, training.task.name, training.seed, said, place)


def lines_of(outcomes: list[Outcome], peace: dict[str, tuple[Said, ...]]) -> list[Line]:
    """The scores, with the goals."""
    lines = []
    if outcomes:
        first = sum(one.place == 0 for one in outcomes) / len(outcomes)
        three = sum(one.place is not None and one.place < SHOWN for one in outcomes)
        of = f"of {len(outcomes)} trainings with a fault"
        lines += [
            Line("cause first", ratio=first, at_least=0.9, note=of),
            Line("among the first three", ratio=three / len(outcomes), at_least=0.97, note=of),
        ]
    if peace:
        grave = sum(s.severity != "low" for said in peace.values() for s in said)
        low = sum(s.severity == "low" for said in peace.values() for s in said)
        of = f"of {len(peace)} healthy trainings"
        lines += [
            Line("findings of medium or worse, together", ratio=grave, at_most=0, note=of),
            Line("low findings, each", ratio=low / len(peace), at_most=1, note=of),
        ]
    return lines


def main(
    quick: Annotated[bool, typer.Option(help="One model and seed for each fault.")] = False,
    only: Annotated[str, typer.Option(help="Faults, or 'healthy', separated by commas.")] = "",
    held_out: Annotated[bool, typer.Option(help="Other models, seeds, widths and steps.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
    verbose: Annotated[bool, typer.Option(help="Say what was said, where it was not true.")] = True,
) -> None:
    """Ask the question."""
    torch.set_num_threads(1)  # the models are too small for more
    started = time.perf_counter()
    names = tuple(name for name in only.split(",") if name)
    outcomes, peace = [], {}
    for fault, training in plantings(quick=quick, held_out=held_out, only=names):
        one = outcome(fault, training)
        outcomes.append(one)
        if verbose and one.place != 0:
            told = "; ".join(map(str, one.said[:4])) or "nothing"
            print(f"{one.fault} in {one.model}, seed {one.seed}: {one.place}: {told}", flush=True)
    for name, training in healthy(int(held_out)) if not names or "healthy" in names else ():
        with tempfile.TemporaryDirectory() as folder:
            peace[name] = says(train(training, Path(folder)))
        if verbose and peace[name]:
            print(f"{name}: {'; '.join(map(str, peace[name][:5]))}", flush=True)
    by_fault = Counter(one.fault for one in outcomes)
    first = Counter(one.fault for one in outcomes if one.place == 0)
    seconds = time.perf_counter() - started
    finish(
        "diagnosis-held-out" if held_out else "diagnosis",
        "cpu",
        lines_of(outcomes, peace),
        save=save,
        title=f"Causes named first, {seconds:.0f} s",
        faults={name: f"{first[name]} of {count}" for name, count in by_fault.items()},
        left_out={name: dict(fault.without) for name, fault in FAULTS.items() if fault.without},
        not_told=dict(NOT_TOLD),
    )
    print({name: f"{first[name]}/{count}" for name, count in by_fault.items()})


if __name__ == "__main__":
    typer.run(main)
