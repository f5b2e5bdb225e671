"""Ways to watch a training, each monitored in every step or every tenth.

A variant is a line of ``VARIANTS``; what it needs is imported when it is attached, on the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.bill.by_hand import Write, place_calls, write_always, write_when_enabled
from benchmarks.bill.tasks import Compile
from benchmarks.five import METRICS, five, measured_modules, named
from benchmarks.workloads import FIVE_METRICS
from tmm.examples.gpt import GPT

Values = Mapping[str, float]
PLAIN, EACH, TENTH = "plain compiled", "tmm, every=1", "tmm, every=10"
EVERYTHING = "tmm, everything, every=1"


def _nothing(step: int) -> None:
    return None


def _no_values(step: int) -> Values:
    return {}


@dataclass(frozen=True)
class Attached:
    """A variant at work: what runs the model, and what comes before and after each step.

    ``end`` gives the values of a monitored step by key, and none of another one.
    """

    forward: Callable[..., Any]
    begin: Callable[[int], None] = _nothing
    end: Callable[[int], Values] = _no_values
    optimizer: torch.optim.Optimizer | None = None
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Goals:
    """The most that a variant may take, as ratios to the plain compiled program.

    ``cold`` and ``warm`` are of the time to the end of the last step; ``warm_start`` is of that to
    the end of the first one in a second process.
    """

    cold: float | None = None
    warm: float | None = None
    warm_start: float | None = None


@dataclass(frozen=True)
class Variant:
    """A way to watch a training, monitored in each ``every``-th step.

    ``attach`` gets the model, which is not compiled yet, what compiles it, the backend and
    ``every``. ``package`` must be installed for it. ``same_work`` tells whether its values are the
    five statistics of every module.
    """

    name: str
    attach: Callable[[GPT, Compile, str, int], Attached]
    every: int = 1
    goals: Goals = field(default_factory=Goals)
    package: str | None = None
    same_work: bool = True
    note: str = ""


def plain(model: GPT, compile: Compile, backend: str, every: int) -> Attached:
    """Nobody watches."""
    return Attached(compile(model, backend))


def uncompiled(model: GPT, compile: Compile, backend: str, every: int) -> Attached:
    """Nobody watches, nothing is compiled."""
    return Attached(model)


def with_tmm(
    model: GPT, compile: Compile, backend: str, every: int, *, everything: bool = False, **how: Any
) -> Attached:
    """``tmm.instrument``; ``how`` are more of its arguments."""
    import tmm

    asked = [tmm.activation(*FIVE_METRICS)]
    if everything:
        asked += [
            *(rule(*FIVE_METRICS) for rule in (tmm.activation_gradient, tmm.gradient)),
            *(tmm.parameter(*FIVE_METRICS), tmm.update("relative_norm"), tmm.attention("entropy")),
        ]
    spec = tmm.Spec(*asked, every=every)
    forward = tmm.instrument(compile(model, backend), spec, **how)
    monitor = tmm.monitor(forward)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    if everything:
        monitor.watch(optimizer)

    def end(step: int) -> Values:
        monitor.end_step()
        return {} if step % every else monitor.get_step_metrics()

    def close() -> None:
        tmm.remove(forward)

    return Attached(forward, monitor.begin_step, end, optimizer, close)


def eager_hooks(model: GPT, compile: Compile, backend: str, every: int) -> Attached:
    """Forward hooks on the model as it is, which measure in monitored steps."""
    rows: dict[str, torch.Tensor] = {}
    is_on = False

    def measure(name: str, module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        if is_on:
            rows[name] = five(output)

    for name, child in measured_modules(model).items():
        child.register_forward_hook(partial(measure, name))

    def begin(step: int) -> None:
        nonlocal is_on
        is_on = step % every == 0

    def end(step: int) -> Values:
        values = named(rows, torch.stack(list(rows.values()))) if rows else {}
        rows.clear()
        return values

    return Attached(model, begin, end)


def traced_hooks(model: GPT, compile: Compile, backend: str, every: int) -> Attached:
    """Hooks registered before compiling: one program, whose buffer is read where it is asked."""
    children = measured_modules(model)
    buffer = _hook_all(model, ExitStack())

    def end(step: int) -> Values:
        return {} if step % every else named(children, buffer)

    return Attached(compile(model, backend), end=end)


def hooks_of_monitored_steps(model: GPT, compile: Compile, backend: str, every: int) -> Attached:
    """Hooks registered on the compiled model for the monitored steps: Dynamo makes two programs."""
    import torch._dynamo

    # Else Dynamo ignores hooks that come after it has compiled.
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    children, hooks = measured_modules(model), ExitStack()
    buffer = torch.zeros(len(children), 5, device=model.lm_head.weight.device)

    def begin(step: int) -> None:
        if step % every == 0:
            _hook_all(model, hooks, buffer)

    def end(step: int) -> Values:
        hooks.close()
        return {} if step % every else named(children, buffer)

    return Attached(compile(model, backend), begin, end)


def _hook_all(model: GPT, hooks: ExitStack, buffer: torch.Tensor | None = None) -> torch.Tensor:
    """Register a hook on each module that writes its row of ``buffer``, a new one if none."""
    children = measured_modules(model)
    if buffer is None:
        buffer = torch.zeros(len(children), 5, device=model.lm_head.weight.device)

    def hook(row: int) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def measure(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
            buffer[row] = five(output)

        return measure

    for row, child in enumerate(children.values()):
        hooks.callback(child.register_forward_hook(hook(row)).remove)
    return buffer


def module_monitor(model: GPT, compile: Compile, backend: str, every: int) -> Attached:
    """torch-module-monitor on the compiled model."""
    from torch_module_monitor import ModuleMonitor  # type: ignore[import-not-found,unused-ignore]

    monitor = ModuleMonitor(monitor_step_fn=lambda step: step % every == 0)
    forward = compile(model, backend)
    monitor.set_module(forward)
    for name, metric in METRICS.items():
        monitor.add_activation_metric(name, metric)

    def end(step: int) -> Values:
        monitor.end_step()
        return {} if step % every else monitor.get_step_metrics()

    return Attached(forward, monitor.begin_step, end)


def by_hand(model: GPT, compile: Compile, backend: str, every: int, *, write: Write) -> Attached:
    """Calls placed in the model's forward."""
    enabled, read = place_calls(model, write)

    def begin(step: int) -> None:
        enabled.fill_(step % every == 0)

    def end(step: int) -> Values:
        return {} if step % every else read()

    return Attached(compile(model, backend), begin, end)


MONITOR = "torch_module_monitor"
IN_EACH = "computed in each step, read in each 10th"
START = Goals(warm_start=1.1)
SPARSE = Goals(cold=1.15, warm=1.05, warm_start=1.1)
VARIANTS = (
    Variant(PLAIN, plain, same_work=False),
    Variant(EACH, with_tmm, goals=START),
    Variant(TENTH, with_tmm, 10, SPARSE),
    Variant("tmm, every=10, programs=1", partial(with_tmm, programs=1), 10, SPARSE),
    Variant("tmm, every=10, programs=2", partial(with_tmm, programs=2), 10),
    Variant(
        EVERYTHING,
        partial(with_tmm, everything=True),
        goals=Goals(warm_start=1.15),
        same_work=False,
        note="and gradients of both kinds, parameters, updates, entropies of attention",
    ),
    Variant("hooks before torch.compile, every=1", traced_hooks),
    Variant("hooks before torch.compile, every=10", traced_hooks, 10, note=IN_EACH),
    Variant("hooks after torch.compile, every=10", hooks_of_monitored_steps, 10),
    Variant("by hand, traced, every=10", partial(by_hand, write=write_always), 10, note=IN_EACH),
    Variant(
        "by hand, an operator, every=10",
        partial(by_hand, write=write_when_enabled),
        10,
        note="an operator that returns at once in the other steps",
    ),
    Variant("torch-module-monitor, every=1", module_monitor, package=MONITOR),
    Variant("torch-module-monitor, every=10", module_monitor, 10, package=MONITOR),
    Variant("not compiled", uncompiled, same_work=False),
    Variant("forward hooks, not compiled, every=1", eager_hooks),
    Variant("forward hooks, not compiled, every=10", eager_hooks, 10),
)
"""All of them; the first one is what ratios are to."""
QUICK = (PLAIN, EACH, TENTH, EVERYTHING)
