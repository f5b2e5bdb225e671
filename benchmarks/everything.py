"""What it costs to measure everything, how often one does, and what steps in between cost.

    python -m benchmarks.everything [--rounds 300] [--quick] [--save]
    python -m benchmarks.everything --default-only [--rounds 900]

Activations, their gradients, gradients, parameters (five statistics of each), updates and the
entropy of attention, of all modules; for comparison activations alone, these with kurtosis, and
what ``default_spec`` asks for. One instrumented model is monitored in each step, each 10th and each
100th, in turns with the plain compiled program, whose module it shares. Each timed step comes
behind one of the same program, as in a training. Ratios of each 10th step are sums over 10 rounds.
Steps that are not monitored have rounds of their own, against the very program that they run,
called outside of any step and with an optimizer that nobody watches: two compilations of one
program differ by some per mille. "Reading" is one sum over each tensor that is measured. Memory is
what a step holds at most, parameters included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

import torch
import typer
from torch import nn

import tmm
from benchmarks.compiled import kernel_launches
from benchmarks.parameters import peak_memory
from benchmarks.reading import attention_inputs, outputs_of, parameters_of, reader, size_of
from benchmarks.report import Line, finish, timed, with_goal
from benchmarks.timing import Timing, interleave
from benchmarks.workloads import FIVE_METRICS, Workload, training_step, usual_workload

PLAIN, READ_ACTIVATIONS, READ_ALL = "plain compiled", "reading activations", "reading everything"
BARE = "the instrumented program, outside of steps"
ACTIVATIONS, EVERYTHING = "activations, each step", "everything, each step"
KURTOSIS = "activations with kurtosis, each step"
TENTH, HUNDREDTH = "everything, each 10th step", "everything, each 100th step"
DEFAULT = "tmm.default_spec(), each 10th step"
OFF = "steps that are not monitored"
SPECS: Mapping[str, tmm.Spec] = {
    ACTIVATIONS: tmm.Spec(tmm.activation(*FIVE_METRICS), every=2),
    KURTOSIS: tmm.Spec(tmm.activation(*FIVE_METRICS, "kurtosis"), every=2),
    EVERYTHING: tmm.Spec(
        tmm.activation(*FIVE_METRICS),
        tmm.activation_gradient(*FIVE_METRICS),
        tmm.gradient(*FIVE_METRICS),
        tmm.parameter(*FIVE_METRICS),
        tmm.update("relative_norm"),
        tmm.attention("entropy"),
        every=2,
    ),
    DEFAULT: tmm.default_spec(every=2),
}
"""Even steps are monitored; the benchmark chooses the numbers."""


@dataclass
class Watched:
    """An instrumented model whose steps are monitored or not as one chooses."""

    monitor: tmm.Monitor
    train: Callable[[], None]
    bare: Callable[[], None]
    step: int = 0

    def run(self, *, monitored: bool) -> None:
        """One training step."""
        self.step += 2
        with self.monitor.step(self.step + (not monitored)):
            self.train()
        if monitored:
            self.monitor.get_step_metrics()


@dataclass
class Cadence:
    """Steps of which each ``every``-th is monitored, behind one more of most steps' kind each."""

    watched: Watched
    every: int
    monitored: list[bool] = field(default_factory=list)
    is_settled: bool = False

    def __call__(self) -> None:
        """Run the step that comes before, or the next one."""
        self.is_settled = not self.is_settled
        if self.is_settled:
            self.watched.run(monitored=self.every == 1)
            return
        self.monitored.append(len(self.monitored) % self.every == 0)
        self.watched.run(monitored=self.monitored[-1])


def watch(module: nn.Module, workload: Workload, spec: tmm.Spec) -> Watched:
    """Instrument the compiled module, and an optimizer of its own."""
    model = tmm.instrument(torch.compile(module), spec)
    monitor = tmm.monitor(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-4)
    if spec.measures("update"):
        monitor.watch(optimizer)
    tokens = workload.tokens()
    train = training_step(module, model, tokens, optimizer=optimizer)
    return Watched(monitor, train, bare=training_step(module, model, tokens))


def measured_tensors(workload: Workload) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """What is read of activations, and of everything; an update is of two versions of a tensor."""
    module, tokens = workload.model(), workload.tokens()
    outputs, gradients = (outputs_of(module, tokens) for _ in range(2))
    versions = [tensor for _ in range(4) for tensor in parameters_of(module)]
    # Of parameters: gradient, parameter, and both that make the update.
    return outputs, [*outputs, *gradients, *versions, *attention_inputs(module, tokens)]


def lines_of(timings: Mapping[str, Timing], cadences: Mapping[str, Cadence]) -> list[Line]:
    """Times of steps, of reading, and what is added against reading."""
    read_activations, read_all = timings[READ_ACTIVATIONS], timings[READ_ALL]
    on_cpu = not torch.cuda.is_available()
    goals = {ACTIVATIONS: 1.01, KURTOSIS: 1.03, EVERYTHING: 1.06} if on_cpu else {}
    goals |= {TENTH: 1.015, DEFAULT: 1.01}
    lines = [timed(PLAIN, timings[PLAIN])]
    for name, cadence in cadences.items():
        timing = timings[name].in_blocks(cadence.every) if cadence.every > 1 else timings[name]
        if timing.seconds:
            note = f"{len(timing.seconds)} blocks of {cadence.every}" if cadence.every > 1 else ""
            lines.append(with_goal(timed(name, timing, note), at_most=goals.get(name)))
    off = timed(OFF, timings[OFF], f"{len(timings[OFF].seconds)} rounds, to {BARE}")
    lines.append(with_goal(off, at_most=1.003))
    lines += [timed(READ_ACTIVATIONS, read_activations), timed(READ_ALL, read_all)]
    compared = (
        (f"added by {ACTIVATIONS}, over {READ_ACTIVATIONS}", ACTIVATIONS, read_activations, 1.2),
        (f"added by {EVERYTHING}, over {READ_ALL}", EVERYTHING, read_all, None),
    )
    for title, name, read, limit in compared:
        line = timed(title, Timing(tuple(timings[name].added), read.seconds))
        lines.append(with_goal(line, at_most=None if on_cpu else limit))
    beyond = zip(timings[EVERYTHING].seconds, read_all.seconds, strict=True)
    rest = Timing(tuple(own - read for own, read in beyond), timings[PLAIN].seconds)
    line = timed("everything, each step, without reading", rest)
    return [*lines, with_goal(line, at_most=1.03)]


def lines_of_default(timing: Timing) -> list[Line]:
    """Blocks of ten steps, and both kinds of steps in them."""
    places = range(len(timing.seconds))
    lines = [with_goal(timed(DEFAULT, timing.in_blocks(10)), at_most=1.01)]
    for name, chosen in (
        ("its steps that are monitored", [i for i in places if i % 10 == 0]),
        ("the others", [i for i in places if i % 10]),
    ):
        pairs = [(timing.seconds[i], timing.baseline[i]) for i in chosen]
        own, plain = zip(*pairs, strict=True)
        lines.append(timed(name, Timing(own, plain), f"{len(own)} rounds"))
    return lines


def memory_lines(peaks: Mapping[str, int], parameters: int) -> list[Line]:
    """Ratios of the most bytes that steps hold, parameters included."""
    whole = parameters + peaks[PLAIN]
    kept = 0 if torch.cuda.is_available() else parameters  # copies of them, from step to step
    return [
        Line(
            "peak memory, activations",
            ratio=(parameters + peaks[ACTIVATIONS]) / whole,
            at_most=1.02,
            note=f"plain {whole / 1e6:.1f} MB",
        ),
        Line(
            "peak memory, everything",
            ratio=(parameters + kept + peaks[EVERYTHING]) / whole,
            at_most=1.02 + parameters / whole,
            note=f"goal: the parameters ({parameters / 1e6:.1f} MB) once more, and 2 %",
        ),
    ]


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 300,
    quick: Annotated[bool, typer.Option(help="Few rounds.")] = False,
    toy: Annotated[bool, typer.Option(help="A toy model: only shows that it runs.")] = False,
    default_only: Annotated[bool, typer.Option(help="Nothing but tmm.default_spec().")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure what it costs to measure everything."""
    workload = usual_workload(toy=toy)
    rounds = 20 if toy else 60 if quick else rounds
    module, tokens = workload.model(), workload.tokens()
    plain = training_step(module, torch.compile(module), tokens)
    if default_only:
        cadence = Cadence(watch(module, workload, SPECS[DEFAULT]), 10)
        timings = interleave({PLAIN: plain, DEFAULT: cadence}, rounds, warm_up=10, settle=1)
        lines = [timed(PLAIN, timings[PLAIN]), *lines_of_default(timings[DEFAULT])]
        title = f"tmm.default_spec(): {workload.name}"
        finish("default-spec", workload.device, lines, save=save, title=title, rounds=rounds)
        return
    watched = {name: watch(module, workload, spec) for name, spec in SPECS.items()}
    everything = watched[EVERYTHING]
    cadences = {
        ACTIVATIONS: Cadence(watched[ACTIVATIONS], 1),
        KURTOSIS: Cadence(watched[KURTOSIS], 1),
        EVERYTHING: Cadence(everything, 1),
        TENTH: Cadence(everything, 10),
        HUNDREDTH: Cadence(everything, 100),
        DEFAULT: Cadence(watched[DEFAULT], 10),
    }
    outputs, measured = measured_tensors(workload)
    reads = {READ_ACTIVATIONS: reader(outputs), READ_ALL: reader(measured)}
    warm_up = 10  # blocks of ten begin with a monitored step
    timings = interleave({PLAIN: plain, **cadences, **reads}, rounds, warm_up, settle=1)
    pair = {BARE: everything.bare, OFF: lambda: everything.run(monitored=False)}
    timings |= interleave(pair, rounds, settle=1)
    parameters = size_of(parameters_of(module))
    steps = {
        name: lambda w=one: w.run(monitored=True)
        for name, one in watched.items()
        if name != DEFAULT
    }
    peaks = {n: peak_memory(step) for n, step in {PLAIN: plain, **steps}.items()}
    finish(
        "everything",
        workload.device,
        [*lines_of(timings, cadences), *memory_lines(peaks, parameters)],
        save=save,
        title=f"everything: {workload.name}",
        rounds=rounds,
        read_bytes={READ_ACTIVATIONS: size_of(outputs), READ_ALL: size_of(measured)},
        peak_bytes=peaks,
        kernel_launches={n: kernel_launches(s) for n, s in {PLAIN: plain, **steps}.items()},
    )


if __name__ == "__main__":
    typer.run(main)
