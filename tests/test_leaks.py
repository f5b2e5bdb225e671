"""A model that is dropped or taken off leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import tmm
from tmm.module_monitor import ModuleMonitor
from tmm.runs.instrument import steps_of

RMS = tmm.activation("rms")


class Net(nn.Module):
    """Records a value, and attends."""

    def __init__(self, *, breaks: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.breaks = breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).relu()
        if self.breaks:
            torch._dynamo.graph_break()
        tmm.record("mean", x.mean())
        return self.attention(x, x, x)[0]  # type: ignore[no-any-return]


def as_it_is(net: nn.Module) -> nn.Module:
    return net


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="aot_eager")  # type: ignore[return-value]


def train(model: nn.Module, monitor: tmm.Monitor, optimizer: torch.optim.Optimizer) -> None:
    for step in range(2):
        with monitor.step(step):
            model(torch.randn(2, 3, 4)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.fixture(autouse=True)
def only_what_comes_now() -> None:
    """The collector passes by what other tests have left, which would take most of the time."""
    gc.collect()
    gc.freeze()


def collect() -> None:
    for _ in range(3):
        gc.collect()


SPECS = {
    "activation": tmm.Spec(RMS, tmm.attention("entropy"), alerts=True),
    "gradient": tmm.Spec(
        RMS, tmm.activation_gradient("rms"), tmm.gradient("norm"), tmm.update("relative_norm")
    ),
    "reference": tmm.Spec(tmm.activation_difference("l2"), tmm.rcc(), reference="init"),
    "run": tmm.Spec(RMS, tmm.parameter("rms")),
}


@pytest.mark.parametrize(
    ("kind", "prepare", "breaks"),
    [
        ("activation", as_it_is, False),
        ("activation", compiled, True),
        ("gradient", compiled, False),
        ("reference", compiled, False),
        ("run", as_it_is, False),
    ],
)
def test_a_model_that_is_dropped_is_collected(
    kind: str, prepare: Callable[[nn.Module], nn.Module], breaks: bool, tmp_path: Path
) -> None:
    run = tmp_path / "run" if kind == "run" else None
    net = Net(breaks=breaks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    model = tmm.instrument(prepare(net), SPECS[kind], run=run)
    monitor = tmm.monitor(model)
    monitor.watch(optimizer)
    train(model, monitor, optimizer)
    gone = [weakref.ref(thing) for thing in (net, monitor, steps_of(model).twin)]
    del net, model, monitor
    collect()
    assert [reference() for reference in gone] == [None] * 3  # the optimizer is still there
    if run is not None:
        with tmm.open_run(run) as recorded:
            assert recorded.steps.tolist() == [0, 1]
            assert len(recorded.series("activation/first/rms")[0]) == 2


def test_a_model_that_is_dropped_within_a_step_is_collected() -> None:
    net = Net()
    monitor = tmm.monitor(tmm.instrument(net, tmm.Spec(RMS)))
    monitor.begin_step(0)
    net(torch.randn(2, 3, 4))
    gone = weakref.ref(net)
    del net, monitor
    collect()
    assert gone() is None


def test_a_model_of_a_module_monitor_is_collected() -> None:
    net = Net()
    monitor = ModuleMonitor()
    monitor.set_module(net)
    monitor.add_activation_metric("norm", torch.norm)
    monitor.begin_step(0)
    net(torch.randn(2, 3, 4))
    monitor.end_step()
    gone = weakref.ref(net)
    del net, monitor
    collect()
    assert gone() is None


# What torch itself keeps of each compilation, bounded in number, or of a call of torch.compile.
_OF_TORCH = {"CompilationMetrics", "_TorchCompileWrapper", "CapturedTraceback"}


@pytest.mark.parametrize(
    ("prepare", "removes"), [(as_it_is, True), (compiled, True), (compiled, False)]
)
def test_cycles_of_instrument_and_remove_keep_nothing(
    prepare: Callable[[nn.Module], nn.Module], removes: bool
) -> None:
    def cycle() -> None:
        net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        model = tmm.instrument(prepare(net), tmm.Spec(RMS, tmm.parameter("rms")))
        with tmm.monitor(model).step(0):
            model(torch.randn(2, 4)).sum().backward()
        if removes:
            tmm.remove(model)

    def kinds() -> Counter[str]:
        collect()
        return Counter(type(thing).__name__ for thing in gc.get_objects())

    for _ in range(3):
        cycle()
    before = kinds()
    cycles = 4
    for _ in range(cycles):
        cycle()
    kept = {kind: (count - before[kind]) / cycles for kind, count in kinds().items()}
    ours = ("finalize", "Handle", "MeasuredGraph", "Twin", "Monitor", "Linear", "FakeTensor")
    guards = ("CheckFunctionManager", "GuardManagerWrapper", "StackSummary", "FrameSummary", "Node")
    assert {kind: kept.get(kind, 0) for kind in ours + guards} == dict.fromkeys(ours + guards, 0)
    assert sum(count for kind, count in kept.items() if kind not in _OF_TORCH) < 120
