"""What the alternatives cost: five statistics of every module's output, in every step.

    python -m benchmarks.alternatives [--rounds 60] [--quick] [--only "NAME;..."] [--save]

All of them take turns in one run, each on a model of its own with the same weights; tmm, which puts
nothing on the model, on that of the plain compiled program. A turn is two steps of which the second
one is timed, as the first one finds the caches full of another program. ``ratio`` is to the plain
compiled step; what an alternative adds is taken against the program that it starts from, so that an
uncompiled one is not blamed for not being compiled. What is not installed or fails is listed with
the reason. ``pip install 'tmm-compile[bench]'`` brings the packages.
"""

from __future__ import annotations

import importlib.util
import statistics
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from benchmarks.alternatives import ALL, Alternative
from benchmarks.alternatives.interface import COMPILED, Attached
from benchmarks.compiled import Compiled, count_compiled, kernel_launches
from benchmarks.parameters import peak_memory
from benchmarks.report import Line, finish, timed, with_goal
from benchmarks.timing import Timing, interleave, median_interval
from benchmarks.workloads import Workload, training_step, usual_workload

OURS = "tmm"
AT_LEAST = {"forward hooks": 20.0, "torch-module-monitor": 20.0}
"""How many times what tmm adds these must add; asked for on a CPU."""
LIMIT_ON_A_CPU = 1.01
NOT_QUICK = ("nnsight, compiled", "wandb.watch, compiled")  # they compile for long
STALE = "fails: most values are the same in each step, so most of its functions are not run"
Values = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Running:
    """An alternative that works: its step, what it compiled and how many values it gives."""

    alternative: Alternative
    attached: Attached
    step: Values
    compiled: Compiled
    values: int


def attach(
    alternative: Alternative, workload: Workload, model: nn.Module | None = None
) -> tuple[Attached, Values]:
    """Attach an alternative to a model, one of its own if none is given; its step comes with it."""
    attached = alternative.attach(workload.model() if model is None else model)
    train = training_step(attached.module, attached.forward, workload.tokens())

    def step() -> Mapping[str, float]:
        attached.begin()
        train()
        return attached.read()

    return attached, step


def start(alternative: Alternative, workload: Workload, model: nn.Module) -> Running:
    """Attach an alternative and run two steps, which compile."""
    attached, step = attach(alternative, workload, model)
    # Else Dynamo ignores hooks of modules whose class it has compiled for another alternative.
    guards = torch._dynamo.config.patch(skip_nnmodule_hook_guards=alternative.leaves_model)
    try:
        with guards, count_compiled() as compiled:
            step()
            values = step()
    except Exception:
        attached.close()
        raise
    return Running(alternative, attached, step, compiled, len(values))


def start_all(
    chosen: tuple[Alternative, ...], workload: Workload
) -> tuple[dict[str, Running], dict[str, str]]:
    """Those that run, and why the others do not.

    The last ones start first: unit-scaling forgets all compiled programs when it starts.
    """
    running: dict[str, Running] = {}
    failed: dict[str, str] = {}
    shared: dict[str, nn.Module] = {}
    for alternative in reversed(chosen):
        package = alternative.package
        if package is not None and importlib.util.find_spec(package) is None:
            failed[alternative.name] = "not installed"
            continue
        model = workload.model()
        if alternative.leaves_model:
            model = shared.setdefault(alternative.base, model)
        try:
            running[alternative.name] = start(alternative, workload, model)
        except Exception as error:  # how it fails is what the report is to say
            failed[alternative.name] = f"fails: {type(error).__name__}: {reason(error)}"
    return {name: running[name] for name in (a.name for a in chosen) if name in running}, failed


def reason(error: Exception) -> str:
    """The first line of a message that says something, or else the line that failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and not lines[0].endswith(":"):
        return lines[0][:200]
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{' '.join(lines[:1])} {last.line} ({Path(last.filename).name})".strip()


def take_turns(running: Mapping[str, Running], rounds: int) -> dict[str, Timing]:
    """Time all of them; those that keep other processes busy in rounds of their own."""
    beside = {name: one for name, one in running.items() if not one.alternative.works_aside}
    aside = {name: one for name, one in running.items() if one.alternative.works_aside}
    timings = interleave(steps_of(beside), rounds, settle=1)
    bases = {one.alternative.base for one in aside.values()} | {COMPILED}
    if aside:
        chosen = {name: one for name, one in beside.items() if name in bases} | aside
        again = interleave(steps_of(chosen), rounds, settle=1)
        timings |= {name: again[name] for name in aside}
        timings |= {f"{name}, again": again[name] for name in bases}
    return timings


def steps_of(running: Mapping[str, Running]) -> dict[str, Callable[[], None]]:
    """The steps, whose values are forgotten."""
    return {name: lambda one=one: void(one.step) for name, one in running.items()}  # type: ignore[misc]


def measure(
    running: Mapping[str, Running], failed: Mapping[str, str], rounds: int
) -> tuple[list[Line], list[Line]]:
    """The lines of the alternatives, and those that compare what they add with what tmm adds."""
    timings = take_turns(running, rounds)
    lines, compared = [], []
    on_cpu = not torch.cuda.is_available()
    for name, found in running.items():
        alternative = found.alternative
        if alternative.same_work and is_stale(found.step(), found.step()):
            lines.append(Line(name, note=STALE))
            continue
        line = timed(name, timings[name], alternative.does)
        lines.append(with_goal(line, at_most=LIMIT_ON_A_CPU) if name == OURS and on_cpu else line)
        if OURS in running and name not in {OURS, alternative.base}:
            ours = added(timings, running[OURS].alternative)
            line = over_ours(name, added(timings, alternative), ours)
            compared.append(with_goal(line, at_least=AT_LEAST.get(name) if on_cpu else None))
    lines += [Line(name, note=why) for name, why in failed.items()]
    return lines, compared


def is_stale(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether most values of two steps are the same, though the training went on."""
    same = sum(before[key] == after[key] for key in before)
    return 2 * same > len(before)


def added(timings: Mapping[str, Timing], alternative: Alternative) -> list[float]:
    """Seconds that an alternative adds to its base, round by round."""
    base = f"{alternative.base}, again" if alternative.works_aside else alternative.base
    return timings[alternative.name].against(timings[base]).added


def over_ours(name: str, theirs: list[float], ours: list[float]) -> Line:
    """How many times the time that tmm adds an alternative adds, with a cautious interval.

    What tmm adds may be too little to tell it from nothing; there is no upper end then.
    """
    own, (low, high) = statistics.median(ours), median_interval(ours)
    their_low, their_high = median_interval(theirs)
    middle = statistics.median(theirs)
    return Line(
        f"added by {name}, over what tmm adds",
        middle * 1e3,
        middle / own if own > 0 else None,
        their_low / high if high > 0 else None,
        their_high / low if low > 0 else None,
        note=f"tmm adds {own * 1e3:.2f} ms ({low * 1e3:.2f} to {high * 1e3:.2f})",
    )


def void(step: Callable[[], object]) -> None:
    """Run and forget what comes back."""
    step()


def details(found: Running) -> dict[str, object]:
    """What the report keeps of an alternative besides its time."""
    return {
        "does": found.alternative.does,
        "same_work": found.alternative.same_work,
        "values": found.values or None,
        "peak_bytes": peak_memory(found.step),
        "kernel_launches": kernel_launches(found.step),
        **found.compiled.numbers(),
    }


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 60,
    quick: Annotated[bool, typer.Option(help="Few rounds, not all of them.")] = False,
    toy: Annotated[bool, typer.Option(help="A toy model: only shows that it runs.")] = False,
    only: Annotated[str, typer.Option(help="Names of alternatives, separated by semicolons.")] = "",
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Compare tmm with its alternatives."""
    workload = usual_workload(toy=toy)
    wanted = {name.strip() for name in only.split(";")} - {""}
    bases = {COMPILED} | {a.base for a in ALL if a.name in wanted}
    chosen = tuple(a for a in ALL if not wanted or a.name in wanted | bases)
    if quick:
        chosen = tuple(a for a in chosen if a.name not in NOT_QUICK)
    running, failed = start_all(chosen, workload)
    lines, compared = measure(running, failed, 2 if toy else 10 if quick else rounds)
    found = {name: details(one) for name, one in running.items()}
    for one in running.values():
        one.attached.close()
    finish(
        "alternatives",
        workload.device,
        [*lines, *compared],
        save=save,
        title=f"alternatives: {workload.name}",
        details=found,
        failed=failed,
    )


if __name__ == "__main__":
    typer.run(main)
