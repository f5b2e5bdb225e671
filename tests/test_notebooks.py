"""Cells of a notebook that run again, that are interrupted, and what they show."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

import tmm
from tmm.core.interactive import is_interactive

RMS = tmm.Spec(tmm.activation("rms"))
AGAIN = "instrumented already, and is now instrumented anew"


@pytest.fixture
def at_a_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


def take_step(model: nn.Module, step: int) -> dict[str, object]:
    monitor = tmm.monitor(model)
    with monitor.step(step):
        model(torch.ones(2, 4)).sum().backward()
    return dict(monitor.get_step_metrics())


def test_a_script_is_none() -> None:
    assert not is_interactive()
    model = tmm.instrument(network(), RMS)
    with pytest.raises(ValueError, match=r"instrumented already; tmm.remove"):
        tmm.instrument(model, RMS)


@pytest.mark.usefixtures("at_a_prompt")
@pytest.mark.parametrize("way", ["uncompiled", "compiled", "in place"])
def test_the_second_replaces_the_first(tmp_path: Path, way: str) -> None:
    net = network()
    if way == "in place":
        net.compile(backend="eager")
    first: nn.Module = torch.compile(net, backend="eager") if way == "compiled" else net
    model = tmm.instrument(first, RMS, run=tmp_path / "run")
    assert "activation/0/rms" in take_step(model, 0)
    with pytest.warns(tmm.MonitoringWarning, match=rf"{AGAIN}.* is in .*run\. ") as told:
        model = tmm.instrument(first, tmm.Spec(tmm.activation("mean")), run=tmp_path / "run")
    assert told[0].filename == __file__
    values = take_step(model, 0)
    assert "activation/0/mean" in values
    assert "activation/0/rms" not in values
    tmm.remove(model)
    with pytest.raises(ValueError, match="not instrumented"):
        tmm.monitor(model)
    for folder, metric in (("run", "rms"), ("run-2", "mean")):
        with tmm.open_run(tmp_path / folder) as run:
            assert run.keys("activation/0")[0] == f"activation/0/{metric}"
            assert run.state is not None
            assert run.state.status == "finished"


@pytest.mark.usefixtures("at_a_prompt")
def test_what_is_compiled_anew_is_another_model() -> None:
    net = network()
    for _ in range(2):  # a cell that compiles and instruments
        model = tmm.instrument(torch.compile(net, backend="eager"), RMS)
        assert "activation/0/rms" in take_step(model, 0)


@pytest.mark.usefixtures("at_a_prompt")
def test_a_step_function_is_replaced() -> None:
    net = network()

    def step(x: torch.Tensor) -> torch.Tensor:
        return net(x).sum()

    first = tmm.instrument(step, RMS, module=net)
    with pytest.warns(tmm.MonitoringWarning, match=AGAIN):
        second = tmm.instrument(first, RMS, module=net)
    assert tmm.remove(second) is step
    first = tmm.instrument(step, RMS, module=net)
    with pytest.raises(ValueError, match="instrumented already"):  # a wrapper around the first
        tmm.instrument(torch.compile(first, backend="eager"), RMS, module=net)
    tmm.remove(first)


@pytest.mark.usefixtures("at_a_prompt")
def test_runs_end_with_what_they_watched(tmp_path: Path) -> None:
    net = network()
    runs = [tmm.start_run("example", root=tmp_path)]
    model = runs[0].watch(net, RMS)
    model(torch.ones(2, 4)).sum().backward()
    runs[0].step()
    with pytest.warns(tmm.MonitoringWarning, match=AGAIN):
        runs[0].watch(model, RMS)  # the same run goes on
    assert not runs[0].is_finished
    model(torch.ones(2, 4)).sum().backward()
    runs[0].step()
    runs.append(tmm.start_run("example", root=tmp_path))
    with pytest.warns(tmm.MonitoringWarning, match=AGAIN):
        runs[1].watch(net, RMS)
    assert runs[0].is_finished
    assert not runs[1].is_finished
    runs[1].finish()
    with tmm.open_run(runs[0].path) as run:
        assert run.steps.tolist() == [0, 1]


@pytest.mark.usefixtures("at_a_prompt")
def test_init_again_finishes_the_current_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = tmm.init("example")
    with pytest.warns(tmm.MonitoringWarning, match=f"{first.id} was not finished"):
        second = tmm.init("example")
    assert first.is_finished
    tmm.log({"loss": 1.0})
    tmm.finish()
    assert second.is_finished


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Shells have processes in the background ignore an interrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("place", ["compiling", "forward", "between", "backward", "optimizer"])
def test_an_interrupt_ends_the_step_alone(tmp_path: Path, place: str, is_compiled: bool) -> None:
    """The step is closed and left out, the next one works, and what came before is kept."""
    net, is_due = network(), False

    def interrupt(*_: object) -> None:
        if is_due:
            signal.raise_signal(signal.SIGINT)

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        if place == "compiling":
            interrupt()
        return graph.forward

    if place == "forward":
        net[1].register_forward_hook(interrupt)
    if place == "backward":
        net[0].weight.register_hook(interrupt)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if place == "optimizer":
        optimizer.register_step_pre_hook(interrupt)
    spec = tmm.Spec(tmm.activation("rms"), tmm.gradient("norm"), tmm.update("norm"))
    model: nn.Module = torch.compile(net, backend=backend) if is_compiled else net  # type: ignore[arg-type]
    model = tmm.instrument(model, spec, run=tmp_path / "run")
    monitor = tmm.monitor(model)
    monitor.watch(optimizer)

    def step(number: int) -> None:
        with monitor.step(number):
            loss = model(torch.ones(2, 4)).square().mean()
            if place == "between":
                interrupt()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    done = []
    if place != "compiling":
        step(0)
        done.append(0)
    is_due = True
    if place != "compiling" or is_compiled:
        with pytest.raises(KeyboardInterrupt):
            step(1)
    assert not monitor.is_step_open
    is_due = False
    step(1)  # the cell runs again from there
    step(2)
    assert len(monitor.get_step_metrics()) == 4 + 2 * 4 + 3
    tmm.remove(model)
    with tmm.open_run(tmp_path / "run") as run:
        assert run.steps.tolist() == [*done, 1, 2]
        assert [event.kind for event in run.events] == ["gap"] * (
            place != "compiling" or is_compiled
        )


def test_findings_show_themselves() -> None:
    net = network().half()
    net[0].weight.data.fill_(60_000.0)
    found = tmm.find_nonfinite(net, torch.ones(2, 4).half())
    assert found is not None
    html = found._repr_html_()
    assert "overflow of float16" in html
    assert "<table" in html


CELLS = (
    "import os, signal, torch, tmm\n"
    "net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))\n"
    "spec = tmm.Spec(tmm.activation('rms'))",
    "model = tmm.instrument(net, spec, run='runs/cells')\nmonitor = tmm.monitor(model)",
    "model = tmm.instrument(net, spec, run='runs/cells')\nmonitor = tmm.monitor(model)",
    "for step in range(10):\n"
    "    with monitor.step(step):\n"
    "        model(torch.ones(2, 4)).sum().backward()\n"
    "        if step == 4:\n"
    "            os.kill(os.getpid(), signal.SIGINT)\n",
    "for step in range(monitor.current_step, 10):\n"
    "    with monitor.step(step):\n"
    "        model(torch.ones(2, 4)).sum().backward()\n"
    "print(sorted(monitor.get_all_metrics()))",
    "tmm.explain(model)",
    "tmm.remove(model)\ntmm.open_run(monitor.path)",
)


def test_in_a_real_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    spec = {"argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}
    kernel = tmp_path / "share" / "jupyter" / "kernels" / "here"
    kernel.mkdir(parents=True)
    (kernel / "kernel.json").write_text(json.dumps(spec | {"display_name": "", "language": ""}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = NotebookClient(
            notebook,
            kernel_name="here",
            timeout=120,
            allow_errors=True,
            resources={"metadata": {"path": str(tmp_path)}},
        )
        client.execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[0] == outputs[1] == []
    assert any(AGAIN in output.text for output in outputs[2] if output.name == "stderr")
    assert [output.ename for output in outputs[3]] == ["KeyboardInterrupt"]
    assert outputs[4][-1].text.strip() == str(list(range(10)))
    assert "modules with rows" in outputs[5][0].data["text/html"]
    assert "10, from 0 to 9" in outputs[6][0].data["text/html"]
