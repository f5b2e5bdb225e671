"""Do other tools name the cause of a planted fault? And what do they say of healthy trainings?

    python -m benchmarks.diagnosis.peers [--only FAULT,...] [--save]

Each fault is planted in the MLP and the GPT with one seed and watched by each tool that is
installed (``tools.py``); ten of the healthy trainings too. A statement is true if one of the
kinds that its word can mean, the place if it names one, and the step are right. A cause is named
first if a true statement is among those of the first step of which the tool says anything, or of
the checks next due: the order within a step is that of its loops. Ours is scored as always:
by its first story.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.diagnosis.faults import FAULTS, Fault
from benchmarks.diagnosis.healthy import healthy
from benchmarks.diagnosis.models import MODELS, Batch
from benchmarks.diagnosis.scoring import is_in_place, rank, says
from benchmarks.diagnosis.tools import TOOLS, WITHOUT_ADAPTER, Statement, Tool
from benchmarks.diagnosis.training import Training, parts, take_step, train
from benchmarks.report import Line, finish

WATCHED = ("mlp", "gpt")
WAYS = ("AdamW", "SGD", "warm-up and cosine", "momentum", "small data")
"""Of the healthy trainings of each model."""

CLIPS_AT = {"clipping_always_clips": 1e-3}
"""The norm to which a training clips, by fault: a user would tell the tool."""


@dataclass
class Score:
    """What a tool said of all trainings; ``claimed`` are faults of a kind that it has words for."""

    tool: str
    version: str
    used: str
    kinds: int = 0
    trainings: int = 0
    claimed: int = 0
    first: int = 0
    at_all: int = 0
    crashed: int = 0
    healthy: int = 0
    with_alarm: int = 0
    alarms: int = 0
    named: dict[str, str] = field(default_factory=dict)


def plantings(only: Sequence[str] = ()) -> Iterator[tuple[Fault, Callable[[], Training]]]:
    """Faults with makers of trainings in which they are planted."""
    for fault in FAULTS.values():
        for name in WATCHED:
            if name not in fault.without and (not only or fault.name in only):
                yield fault, lambda fault=fault, name=name: _planted(fault, name)  # type: ignore[misc]


def _planted(fault: Fault, name: str) -> Training:
    torch.manual_seed(0)
    training = Training(MODELS[name](0), 0, attention=fault.attention)
    fault.plant(training)
    return training


def in_peace() -> Iterator[tuple[str, Training]]:
    """The healthy trainings that are watched."""
    names = {f"{model}, {way}" for model in WATCHED for way in WAYS}
    return ((name, training) for name, training in healthy() if name in names)


def watch(tool: type[Tool], training: Training, clips_at: float | None) -> list[Statement]:
    """Train, watched by the tool; gives what it says in its order."""
    seen: list[Batch] = []
    current: list[Tool] = []

    def keep(step: int, batch: Batch) -> Batch:
        seen[:] = [batch]
        return batch

    def show(step: int) -> None:
        if training.scaler is not None:
            training.scaler.unscale_(current[-1].part.optimizer)
        current[-1].on_gradients(step, seen[0])

    training.batches.append(keep)
    training.gradients.insert(len(training.gradients) if clips_at is None else 0, show)
    said: list[Statement] = []
    for part in parts(training):
        watcher = tool(training, part, clips_at)
        current.append(watcher)
        try:
            for step in range(part.first, part.last):
                with watcher.around(step):
                    loss = take_step(training, part, step)
                watcher.after(step, loss)
        finally:
            watcher.finish()
        said += watcher.said
    return sorted(said, key=lambda one: one.step)


def claims(tool: type[Tool], fault: Fault) -> bool:
    """Whether the tool has a word for a kind of the fault."""
    return any(not fault.kinds.isdisjoint(kinds.split()) for kinds in tool.words.values())


def is_true(said: Statement, tool: type[Tool], fault: Fault, training: Training) -> bool:
    """Whether one meaning of the word, the place if it names one, and the step are right."""
    first, last = fault.steps
    if fault.kinds.isdisjoint(tool.words[said.word].split()):
        return False
    if not first <= said.step <= last + tool.every - 1:
        return False
    return not said.site or is_in_place((said.site,), fault, training)


def judge(
    said: Sequence[Statement], tool: type[Tool], fault: Fault, training: Training
) -> tuple[bool, bool]:
    """Whether the cause is named when the tool first says anything, and whether it is at all."""
    true = [one.step for one in said if is_true(one, tool, fault, training)]
    if not true:
        return False, False
    return min(true) < min(one.step for one in said) + tool.every, True


def _alarms(said: Sequence[Statement]) -> int:
    return len({(one.word, one.site) for one in said})


def score(tool: type[Tool], only: Sequence[str]) -> Score:
    """Plant all faults under the eyes of a tool."""
    result = Score(tool.distribution, version(tool.distribution), tool.used)
    result.kinds = sum(claims(tool, fault) for fault in FAULTS.values())
    for fault, make in plantings(only):
        training = make()
        name = f"{fault.name} in {training.task.name}"
        result.trainings += 1
        result.claimed += claims(tool, fault)
        try:
            said = watch(tool, training, CLIPS_AT.get(fault.name))
        except Exception as error:  # it is told of in the table
            result.crashed += 1
            result.named[name] = f"crashed: {type(error).__name__}: {error}"
            continue
        first, at_all = judge(said, tool, fault, training)
        result.first += first
        result.at_all += at_all
        result.named[name] = "first" if first else "later" if at_all else _brief(said)
    for name, training in in_peace() if not only or "healthy" in only else ():
        said = watch(tool, training, None)
        _count_peace(result, name, _alarms(said), _brief(said))
    return result


def _brief(said: Sequence[Statement]) -> str:
    words = [f"{one.word} {one.site} @{one.step}" for one in said[:3]]
    return "not: " + ("; ".join(words) or "nothing said")


def _count_peace(result: Score, name: str, alarms: int, brief: str) -> None:
    result.healthy += 1
    result.with_alarm += alarms > 0
    result.alarms += alarms
    if alarms:
        result.named[f"healthy: {name}"] = f"{alarms}, {brief}"


def ours(only: Sequence[str]) -> Score:
    """The same of tmm."""
    result = Score("tmm", version("tmm-compile"), "default_spec(every=1), findings()")
    result.kinds = len(FAULTS)
    for fault, make in plantings(only):
        training = make()
        with tempfile.TemporaryDirectory() as folder:
            place = rank(says(train(training, Path(folder))), fault, training)
        result.trainings += 1
        result.claimed += 1
        result.first += place == 0
        result.at_all += place is not None
        name = f"{fault.name} in {training.task.name}"
        result.named[name] = "first" if place == 0 else "not" if place is None else "later"
    for name, training in in_peace() if not only or "healthy" in only else ():
        with tempfile.TemporaryDirectory() as folder:
            said = says(train(training, Path(folder)))
        _count_peace(result, name, len(said), "; ".join(map(str, said[:3])))
    return result


def reason(tool: type[Tool]) -> str | None:
    """Why the tool cannot be used here; None where it can."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(tool.package)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def table(scores: Sequence[Score], left_out: Mapping[str, str]) -> Table:
    """What is shown."""
    columns = ("tool", "kinds it claims", "first", "at all", "healthy with alarm", "alarms")
    shown = Table(*columns, title="Causes named by other tools")
    for one in scores:
        first, at_all = (f"{n} of {one.trainings} ({one.claimed})" for n in (one.first, one.at_all))
        alarmed = f"{one.with_alarm} of {one.healthy}"
        name = f"{one.tool} {one.version}"
        shown.add_row(
            name, f"{one.kinds} of {len(FAULTS)}", first, at_all, alarmed, f"{one.alarms}"
        )
    for name, why in left_out.items():
        shown.add_row(name, why)
    return shown


def main(
    only: Annotated[str, typer.Option(help="Faults, or 'healthy', separated by commas.")] = "",
    tools: Annotated[str, typer.Option(help="Tools, or 'tmm', separated by commas.")] = "",
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Ask the question."""
    torch.set_num_threads(1)  # the models are too small for more
    names = tuple(name for name in only.split(",") if name)
    asked = tools.split(",") if tools else [*(t.distribution for t in TOOLS), "tmm"]
    left_out, scores = dict(WITHOUT_ADAPTER), []
    for tool in TOOLS:
        if tool.distribution not in asked:
            continue
        if why := reason(tool):
            left_out[tool.distribution] = why
            continue
        started = time.perf_counter()
        scores.append(score(tool, names))
        print(f"{tool.distribution}: {time.perf_counter() - started:.0f} s", flush=True)
    if "tmm" in asked:
        scores.append(ours(names))
    Console(width=150).print(table(scores, left_out))
    lines = [
        Line(f"{one.tool}: {what}", ratio=number / max(one.trainings, 1))
        for one in scores
        for what, number in (("cause first", one.first), ("cause at all", one.at_all))
    ]
    finish(
        *("diagnosis-peers", "cpu", lines),
        save=save,
        title="Causes named by other tools",
        tools=[asdict(one) for one in scores],
        left_out=left_out,
    )


if __name__ == "__main__":
    typer.run(main)
