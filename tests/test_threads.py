"""Other threads that call the model while a step is open, as actors and loaders do."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import tmm

SPEC = tmm.Spec(tmm.activation("rms", "mean"), tmm.activation_gradient("rms"), tmm.gradient("norm"))
WAYS: dict[str, Callable[[nn.Module], Any]] = {
    "uncompiled": lambda net: net,
    "whole": lambda net: torch.compile(net, backend="aot_eager"),
}


class Net(nn.Module):
    def __init__(self, *, breaks: bool) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)
        self.breaks = breaks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        if self.breaks:
            torch._dynamo.graph_break()
        return self.last(self.act(h))


@contextmanager
def called_meanwhile(call: Callable[[], object]) -> Iterator[list[BaseException]]:
    """Another thread calls something over and over in the block; gives what it has raised."""
    begun, over, raised = threading.Event(), threading.Event(), list[BaseException]()

    def work() -> None:
        try:
            while not over.is_set():
                call()
                begun.set()
        except BaseException as error:
            raised.append(error)
        finally:
            begun.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    try:
        yield raised
    finally:
        over.set()
        thread.join()


def train(way: str, *, breaks: bool, call: Callable[[Any, Any], object] | None) -> Any:
    """The rows of each step, and the parameters at the end."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Net(breaks=breaks)
    model = tmm.instrument(WAYS[way](net), SPEC)
    monitor = tmm.monitor(model)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor.watch(optimizer)
    rows = []

    def steps() -> None:
        for step in range(3):
            with monitor.step(step):
                for batch in range(4):
                    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(9 * step + batch))
                    model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            rows.append(monitor.get_step_metrics())

    if call is None:
        steps()
    else:
        with called_meanwhile(lambda: call(model, monitor)) as raised:
            steps()
        assert not raised
    tmm.remove(model)
    return rows, [parameter.detach().clone() for parameter in net.parameters()]


def without_gradients(model: Any, monitor: Any) -> None:
    with torch.no_grad():
        model(torch.ones(7, 6))


def with_gradients(model: Any, monitor: Any) -> None:
    model(torch.ones(7, 6))


def of_a_part(model: Any, monitor: Any) -> None:
    with torch.no_grad():
        monitor.module.first(torch.ones(7, 6))


def unmonitored(model: Any, monitor: Any) -> None:
    with monitor.no_monitor():
        model(torch.ones(7, 6))


@pytest.mark.filterwarnings("ignore:.*ran in another thread.*:tmm.MonitoringWarning")
@pytest.mark.parametrize("call", [without_gradients, with_gradients, of_a_part, unmonitored])
@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_passes_in_other_threads_are_none_of_the_step(
    way: str, breaks: bool, call: Callable[[Any, Any], object]
) -> None:
    rows, parameters = train(way, breaks=breaks, call=call)
    want, plain = train(way, breaks=breaks, call=None)
    assert rows == want
    assert all(map(torch.equal, parameters, plain))


def test_a_training_pass_in_another_thread_is_told() -> None:
    model = tmm.instrument(nn.Linear(2, 2), SPEC)
    monitor = tmm.monitor(model)
    with pytest.warns(tmm.MonitoringWarning, match="ran in another thread"):
        for step in range(2):
            with monitor.step(step):
                thread = threading.Thread(target=lambda: model(torch.ones(3, 2)).sum().backward())
                thread.start()
                thread.join()
                model(torch.zeros(3, 2)).sum().backward()
    assert monitor.get_step_metrics()["activation_gradient/[root module]/rms"] == 1
    assert "forward passes in other threads" in tmm.explain(model).unmeasured


@pytest.mark.parametrize("opened", ["here", "in the thread"])
def test_a_run_is_recorded_by_the_thread_that_trains(opened: str, tmp_path: Any) -> None:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with tmm.start_run("threads", root=tmp_path) as run:
        watched = [run.watch(net, SPEC, optimizer=optimizer)] if opened == "here" else []

        def work() -> None:
            model = watched[0] if watched else run.watch(net, SPEC, optimizer=optimizer)
            for _ in range(3):
                model(torch.ones(3, 2)).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                run.step()

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    steps, _ = tmm.open_run(run.path).series("activation/[root module]/rms")
    assert list(steps) == [0, 1, 2]


@pytest.mark.parametrize("first", [0, 1])
def test_a_step_that_begins_while_nothing_is_to_be_measured(first: int) -> None:
    model = tmm.instrument(nn.Linear(2, 2), tmm.Spec(tmm.activation("rms"), every=2))
    monitor = tmm.monitor(model)
    monitor.begin_step(first)
    with monitor.no_monitor():
        monitor.end_step()
        monitor.begin_step(first + 1)
    model(torch.ones(3, 2))
    assert monitor.is_monitoring() == (first == 1)
    monitor.end_step()
    assert bool(monitor.get_step_metrics()) == (first == 1)


@pytest.mark.parametrize("watches", [False, True])
@pytest.mark.parametrize("how", ["log with step", "step"])
def test_what_other_threads_log_is_kept(how: str, watches: bool, tmp_path: Any) -> None:
    net = nn.Linear(2, 2)
    for attempt in range(10):
        with tmm.start_run("log", root=tmp_path, name=str(attempt), system_seconds=None) as run:
            model = run.watch(net, tmm.Spec(tmm.activation("rms"))) if watches else net

            def work(number: int, run: tmm.LiveRun = run) -> None:
                for value in range(60):
                    run.log({f"own/{number}": value})

            threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
            for thread in threads:
                thread.start()
            for step in range(5):
                model(torch.ones(3, 2)).sum().backward()
                if how == "log with step":
                    run.log({"loss": step}, step=step)
                else:
                    run.log({"loss": step})
                if how != "log with step":
                    run.step()
            for thread in threads:
                thread.join()
        recorded = tmm.open_run(run.path)
        assert list(recorded.series("loss")[1]) == [0, 1, 2, 3, 4]
        for number in range(3):
            assert recorded.series(f"own/{number}")[1][-1] == 59
