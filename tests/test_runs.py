"""Runs: started, logged to, ended in every way, found again."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tmm
from tests.interpreters import Interpreter, Interpreters
from tmm.runs.catalog import delete_run, find_run, list_runs, runs_to_prune
from tmm.runs.current import current_run
from tmm.runs.live import LiveRun


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def start(root: Path, **options: Any) -> LiveRun:
    return tmm.start_run(**{"project": "p", "root": root, "system_seconds": None, **options})


Script = Callable[[str], Interpreter]


@pytest.fixture
def script(root: Path, interpreters: Interpreters) -> Iterator[Script]:
    """Makes processes that start a run, say its id, and go on with what is given."""
    processes: list[Interpreter] = []

    def begin(body: str) -> Interpreter:
        code = f"""
import os, sys, tmm
from tmm.runs import run_steps
run_steps.WAIT_FOR_DISK = 60.0  # a step is written before its process is killed, however slowly
run = tmm.start_run("p", root={str(root)!r}, system_seconds=None)
run.log({{"loss": 1.0}})
run.step()
print(run.id, flush=True)
{body}
"""
        processes.append(interpreters.start(code))
        return processes[-1]

    yield begin
    for process in processes:
        process.close()


def own_keys(run: tmm.Run) -> list[str]:
    return [key for key in run.keys(None) if not key.startswith("system/")]


# Values


def test_values_of_every_kind(root: Path) -> None:
    with start(root, name="n", config={"lr": 0.1, "path": root}, tags=["a", "b", "a"]) as run:
        run.log({"loss": 1, "train": {"accuracy": torch.tensor(0.5), "f1": np.float32(0.25)}})
        run.log({"loss": torch.tensor([2.0], requires_grad=True), "flag": True})
        assert run.step() == 1
        run.log({"nan": float("nan"), "big": 2**40, "half": torch.tensor(1.5).bfloat16()})
        run.step()
        run.log({"late": 1.0}, step=7)
        run.log({"loss": np.array(3.0)})
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == [0, 1, 7]
        at = read.at(0)
        assert {key: at[key] for key in own_keys(read) if key in at} == {
            "loss": 2,
            "train/accuracy": 0.5,
            "train/f1": 0.25,
            "flag": 1,
        }
        assert np.isnan(read.at(1)["nan"])
        assert (read.at(1)["big"], read.at(1)["half"]) == (2**40, 1.5)
        assert read.at(7)["loss"] == 3
        assert read.info["config"] == {"lr": 0.1, "path": str(root)}
        assert read.info["tags"] == ["a", "b"]
        assert read.state is not None
        assert (read.state.status, read.state.last_step) == ("finished", 7)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"a": "text"}, TypeError, "log: 'a' is 'text', not a number; log_samples takes texts"),
        ({"a": None}, TypeError, "'a' is None"),
        ({"a": torch.ones(2)}, ValueError, "'a' has shape .2,. .*not one real number"),
        ({"a": torch.tensor(1j)}, ValueError, "'a' has shape"),
        ({"a": {"b": np.ones(3)}}, ValueError, "'a/b' has shape"),
        ({"": 1.0}, ValueError, "the key '' is not text"),
        ({3: 1.0}, ValueError, "the key 3 is not text"),
        ([1.0], TypeError, "give a dictionary"),
    ],
)
def test_what_cannot_be_logged(root: Path, values: Any, error: Any, message: str) -> None:
    with start(root) as run:
        with pytest.raises(error, match=message):
            run.log({"good": 1.0} | values if isinstance(values, dict) else values)
        run.log({"loss": 1.0})
    with tmm.open_run(run.path) as read:
        assert own_keys(read) == ["loss"]  # nothing of the wrong call


def test_steps_do_not_go_back(root: Path) -> None:
    with start(root) as run:
        run.log({"a": 1.0}, step=5)
        with pytest.raises(ValueError, match="step=4 lies before the open step 5"):
            run.log({"a": 1.0}, step=4)
        with pytest.raises(TypeError, match=r"step=1\.5 is not an integer"):
            run.log({"a": 1.0}, step=1.5)  # type: ignore[arg-type]
    for call in (lambda: run.log({"a": 1.0}), run.step, lambda: run.log_samples(0, {"a": "b"})):
        with pytest.raises(RuntimeError, match="is finished; start another one"):
            call()
    run.finish()


def test_bad_arguments(root: Path) -> None:
    for project in ("", "a/b", ".hidden", "ü", 3):
        with pytest.raises(ValueError, match="project="):
            tmm.start_run(project, root=root)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tags='a' is one text; give a list of tags: \['a'\]"):
        start(root, tags="a")
    with pytest.raises(TypeError, match="config=3 is not a dictionary"):
        start(root, config=3)
    assert not root.exists()


def test_samples(root: Path) -> None:
    texts = {"out/put": "naïve \0 text\n", "empty": "", "%2F": "odd"}
    arrays = {"matrix": np.arange(6.0).reshape(2, 3), "half": torch.ones(2).bfloat16(), "one": 3}
    with start(root) as run:
        run.log_samples(3, texts)
        run.log_samples(3, arrays)
        run.log_samples(12, {"a": "b"})
        for wrong, error in (({"a": object()}, TypeError), ({"": "a"}, ValueError)):
            with pytest.raises(error, match="log_samples"):
                run.log_samples(4, wrong)
        with pytest.raises(ValueError, match="at most 16 MiB"):
            run.log_samples(4, {"large": np.zeros(3 << 20)})
    with tmm.open_run(run.path) as read:
        assert read.sample_steps == [3, 12]
        found = read.samples(3)
        assert {name: found[name] for name in texts} == texts
        assert np.array_equal(found["matrix"], arrays["matrix"])
        assert found["half"].tolist() == [1.0, 1.0]  # type: ignore[union-attr]
        assert found["one"].tolist() == 3  # type: ignore[union-attr]
        with pytest.raises(KeyError, match=r"step 4 has no samples.*\[3, 12\]"):
            read.samples(4)


# Models


def train(run: LiveRun, model: nn.Module, steps: int, *, drive: bool = True) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        run.log({"loss": loss})
        if drive:
            run.step(samples=8)


def test_a_watched_model_is_recorded_in_the_steps_of_the_run(root: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with start(root) as run:
        assert run.watch(model) is model
        train(run, model, 25)
        with pytest.raises(RuntimeError, match="watches a model already"):
            run.watch(nn.Linear(2, 2))
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == list(range(25))
        assert read.series("loss")[0].tolist() == list(range(25))
        for key in (
            *("activation/1/zero_fraction", "gradient/0.weight/norm"),
            *("update/0.weight/relative_norm", "parameter/0.bias/rms"),
        ):
            assert read.series(key)[0].tolist() == [0, 10, 20], key
        assert (read.series("system/samples_per_second")[1] > 0).all()
        assert read.events == []
        assert "activation" in read.text("explain.txt")
    assert model(torch.randn(2, 4)).shape == (2, 4)


def test_a_monitor_drives_the_steps_of_the_run(root: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with start(root) as run:
        tmm.instrument(model, tmm.Spec(tmm.activation("rms"), tmm.update("norm")), run=run)
        monitor = tmm.monitor(model)
        monitor.watch(optimizer)
        with pytest.raises(RuntimeError, match="no step is open"):
            run.step()
        for step in (0, 5, 10):
            with monitor.step(step):
                loss = model(torch.randn(8, 4)).square().mean()
                loss.backward()
                optimizer.step()
                run.log({"loss": loss}, step=step)
                with pytest.raises(RuntimeError, match="is not the step"):
                    run.log({"loss": loss}, step=step + 1)
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == [0, 5, 10]
        assert len(read.at(5)) == 4 + len([k for k in read.at(5) if k.startswith("system/")])
        assert read.series("loss")[0].tolist() == [0, 5, 10]


def test_a_monitor_takes_over_the_step_that_the_run_had_opened(root: Path) -> None:
    model = nn.Linear(4, 1)
    with start(root) as run:
        run.log({"before": 1.0})
        run.watch(model, tmm.Spec(tmm.activation("rms")))
        monitor = tmm.monitor(model)
        for step in range(3):
            with monitor.step(step):
                model(torch.randn(2, 4))
                run.log({"loss": step})
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == [0, 1, 2]
        assert read.at(0)["before"] == 1
        assert read.at(2)["loss"] == 2
        assert read.events == []


def test_the_optimizer_may_be_given(root: Path) -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with start(root) as run:
        run.watch(model, tmm.Spec(tmm.update("norm")), optimizer=optimizer)
        model(torch.randn(2, 4)).sum().backward()
        optimizer.step()
        run.step()
    with tmm.open_run(run.path) as read:
        assert read.keys("update") == ["update/weight/norm", "update/bias/norm"]


def test_a_failing_step_keeps_what_was_logged(root: Path) -> None:
    model = nn.Linear(4, 1)
    with pytest.raises(ZeroDivisionError), start(root) as run:
        run.watch(model)
        for step in range(3):
            run.log({"loss": step})
            if step == 2:
                raise ZeroDivisionError("at step 2")
            model(torch.randn(2, 4))
            run.step()
    with tmm.open_run(run.path) as read:
        assert read.series("loss")[1].tolist() == [0, 1, 2]
        assert read.state is not None
        assert read.state.status == "failed"
        assert read.state.reason == "ZeroDivisionError: at step 2"


# Ends


def test_a_run_that_is_stopped_early(root: Path) -> None:
    run = start(root)
    run.log({"a": 1.0})
    run.stop_early("the validation loss rose")
    record = find_run(run.id, root)
    assert (record.status, record.reason) == ("stopped", "the validation loss rose")


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        ("", "finished", ""),
        ("run.log({'open': 1.0})", "finished", ""),
        ("run.log({'open': 1.0}); raise KeyError('x')", "failed", "KeyError: 'x'"),
        ("run.__enter__(); run.__exit__(SystemExit, SystemExit(0), None)", "finished", ""),
        ("run.__exit__(SystemExit, SystemExit(2), None)", "failed", "SystemExit: 2"),
        ("sys.last_value = sys.last_exc = None; del run", "finished", ""),
        ("sys.exit(3)", "finished", ""),
        ("os.kill(os.getpid(), 9)", "crashed", "its process is gone"),
        ("os._exit(1)", "crashed", "its process is gone"),
    ],
)
def test_the_end_of_a_process(
    root: Path, script: Script, body: str, status: str, reason: str
) -> None:
    name = script(body).communicate()[0].strip()
    record = find_run(name, root)
    steps = 2 if "open" in body else 1  # what is open is recorded, too
    assert (record.status, record.reason, record.steps) == (status, reason, steps)


def test_a_running_run_of_another_process(root: Path, script: Script) -> None:
    process = script("sys.stdin.read()")
    name = process.stdout.readline().strip()
    record = find_run(name, root)
    assert (record.status, record.steps) == ("running", 1)
    with pytest.raises(ValueError, match="is running; stop it first"):
        delete_run(record, root)
    with pytest.raises(ValueError, match="is running already"):
        start(root, resume=name)
    assert runs_to_prune(root, timedelta(0)) == ()
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert find_run(name, root).status == "crashed"


def test_a_fork_does_not_keep_a_run_alive(root: Path, script: Script) -> None:
    body = """
if os.fork() == 0:
    try:
        run.log({"a": 1.0})
    except RuntimeError as error:
        print(error, flush=True)
    os.close(1)
    sys.stdin.read()
    os._exit(0)
os.kill(os.getpid(), 9)
"""
    process = script(body)
    process.wait(timeout=60)
    name, refusal = process.stdout.read().splitlines()
    assert "a child forked from it cannot record" in refusal
    assert find_run(name, root).status == "crashed"
    process.stdin.close()


def test_a_run_goes_on(root: Path) -> None:
    with start(root, name="first", config={"lr": 1}, tags=["t"]) as run:
        for value in range(3):
            run.log({"loss": value})
            run.step()
    with start(root, resume="first", config={"lr": 2}) as again:
        assert (again.id, again.current_step) == (run.id, 3)
        again.log({"loss": 3})
    record = find_run(run.id, root)
    assert (record.steps, record.config, record.tags) == (4, {"lr": 1}, ("t",))
    with pytest.raises(LookupError, match=r"no run 'frist'.*the nearest are first"):
        start(root, resume="frist")


def test_a_run_goes_back_to_the_step_of_a_checkpoint(root: Path) -> None:
    with start(root) as run:
        for value in range(8):
            run.log({"loss": value, "first": value})
            run.step()
    with start(root, resume=run.id, step=3) as again:
        with tmm.open_run(run.path) as read:
            assert read.steps.tolist() == list(range(8))  # nothing was recorded yet
        assert again.current_step == 3
        for value in range(3, 6):
            again.log({"loss": 10 * value})
            again.step()
        with tmm.open_run(run.path) as read:
            assert read.steps.tolist() == [0, 1, 2, 3, 4, 5]
    with start(root, resume=run.id, step=5) as third:
        third.log({"loss": -1.0})
    with start(root, resume=run.id) as fourth:
        fourth.log({"loss": -2.0})
    with tmm.open_run(run.path) as read:
        assert read.series("loss")[0].tolist() == list(range(7))
        assert read.series("loss")[1].tolist() == [0, 1, 2, 30, 40, -1, -2]
        assert read.series("first")[0].tolist() == [0, 1, 2]
        with pytest.raises(KeyError, match="step 7 was not recorded"):
            read.at(7)
    assert find_run(run.id, root).last_step == 6
    with start(root, step=100) as new:
        new.log({"loss": 1.0})
    assert find_run(new.id, root).last_step == 100
    for step, error in ((-1, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match=f"step={step}"):
            start(root, resume=run.id, step=step)


def test_a_run_that_went_back_is_followed_by_who_reads_it_already(root: Path) -> None:
    with start(root) as run:
        for value in range(5):
            run.log({"loss": value}, step=value)
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == [0, 1, 2, 3, 4]
        with start(root, resume=run.id, step=2) as again:
            again.log({"loss": 20.0})
        assert read.series("loss")[1].tolist() == [0, 1, 20]


# Many


def test_many_runs_at_once(root: Path, script: Script) -> None:
    processes = [script("") for _ in range(4)]
    threads = [threading.Thread(target=lambda: start(root).finish()) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = {process.communicate()[0].strip() for process in processes}
    records = list_runs(root)
    assert len(records) == 8
    assert names <= {record.id for record in records}
    assert {record.status for record in records} == {"finished"}


def test_two_thousand_runs(root: Path) -> None:
    with start(root, name="original") as run:
        run.log({"loss": 1.0})
    for number in range(2000):
        copy = run.path.with_name(f"copy-{number:04d}")
        shutil.copytree(run.path, copy)
        text = (copy / "run.json").read_text()
        (copy / "run.json").write_text(text.replace(run.id, copy.name))
    assert len(list_runs(root, limit=20)) == 20
    assert find_run("copy-1234", root).steps == 1
    with pytest.raises(LookupError, match="begins the ids of 10 runs"):
        find_run("copy-123", root)


def test_broken_runs_are_listed_as_such(root: Path) -> None:
    paths = []
    for name in ("good", "segment", "info", "state", "empty"):
        run = start(root, name=name)
        if name != "empty":
            run.log({"loss": 1.0})
        run.finish()
        paths.append(run.path)
    _, segment, info, state, _ = paths
    (found,) = segment.glob("*.h5")
    found.write_bytes(b"no HDF5" * 100)
    (info / "run.json").write_text("{")
    (state / "state.json").write_text("[]")
    by_path = {record.path: record for record in list_runs(root)}
    assert len(by_path) == 5
    assert [by_path[path].status for path in paths] == [
        *("finished", "broken", "broken", "broken", "finished")
    ]
    assert by_path[paths[4]].steps == 0
    assert "run.json is not readable" in by_path[info].reason
    assert list_runs(root, status="broken", limit=2)[0].status == "broken"
    assert list_runs(root, project="other") == ()


def test_finding_deleting_and_pruning(root: Path) -> None:
    old, tagged, new = (start(root, name=name) for name in ("old", "tagged", "new"))
    for run in (old, tagged, new):
        run.finish()
    for run in (old, tagged):
        info = json.loads((run.path / "run.json").read_text())
        info["starts"][0]["time"] = "2020-01-01T00:00:00+00:00"
        info["tags"] = ["keep"] if run is tagged else []
        (run.path / "run.json").write_text(json.dumps(info))
    assert list_runs(root)[0].name == "new"
    assert [record.name for record in list_runs(root, tag="keep")] == ["tagged"]
    days = timedelta(days=30)
    assert {record.name for record in runs_to_prune(root, days)} == {"old", "tagged"}
    (record,) = runs_to_prune(root, days, keep_tagged=True)
    assert record.name == "old"
    delete_run(record, root)
    assert not old.path.exists()
    assert len(list_runs(root)) == 2
    assert find_run(str(new.path), root).id == find_run("new", root).id == new.id
    assert find_run(new.id[:-1], root).id == new.id
    with pytest.raises(FileNotFoundError, match="is no folder"):
        list_runs(root / "none")
    with pytest.raises(LookupError, match="among the 0"):
        find_run("x", root / "none")


def test_runs_that_only_instrument_recorded(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    tmm.instrument(model, tmm.Spec(tmm.activation("rms")), run=tmp_path / "plain")
    with tmm.monitor(model).step(0):
        model(torch.randn(1, 2))
    (record,) = list_runs(tmp_path)
    assert (record.id, record.status) == ("plain", "running")
    tmm.remove(model)
    (record,) = list_runs(tmp_path)
    assert (record.id, record.status, record.steps) == ("plain", "finished", 1)
    with tmm.open_run(record.path) as run:
        assert run.state is not None
        assert (run.state.status, run.state.last_step) == ("finished", 0)


# One line


@pytest.fixture
def no_current_run() -> Iterator[None]:
    yield
    tmm.finish()


@pytest.mark.usefixtures("no_current_run")
def test_a_current_run(root: Path) -> None:
    for call in (lambda: tmm.log({"a": 1}), tmm.step, current_run, lambda: tmm.watch(nn.ReLU())):
        with pytest.raises(RuntimeError, match=r"call tmm.init\(project=...\) first"):
            call()
    run = tmm.init("p", root=root, system_seconds=None)
    with pytest.raises(RuntimeError, match=r"is not finished; call tmm.finish\(\) first"):
        tmm.init("p", root=root)
    assert current_run() is run
    model = tmm.watch(nn.Linear(4, 1), tmm.Spec(tmm.activation("rms")))
    for _ in range(2):
        model(torch.randn(2, 4))
        tmm.log({"loss": 1.0})
        tmm.step()
    tmm.finish()
    tmm.finish()
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == [0, 1]
        assert "activation/[root module]/rms" in read.keys(None)


def test_system_metrics_are_recorded(root: Path) -> None:
    with start(root, system_seconds=0.01) as run:
        while not (run._system and run._system.latest()):
            pass
        run.log({"loss": 1.0})
        run.step(tokens=100)
        run.log({"loss": 1.0})
        run.step(tokens=100)
    with tmm.open_run(run.path) as read:
        assert read.series("system/process_memory")[1][0] > 1e6
        assert (read.series("system/tokens_per_second")[1] > 0).all()
        assert "tmm system metrics" not in {thread.name for thread in threading.enumerate()}
    assert os.path.exists(run.path / "state.json")


# Sinks


def test_sinks_get_what_is_recorded(root: Path) -> None:
    taken: list[tuple[int, dict[str, float]]] = []

    def failing(step: int, values: Any) -> None:
        if step == 1:
            raise OSError("no network")

    model = nn.Linear(4, 1)
    sinks = [lambda step, values: taken.append((step, values)), failing]
    with (
        pytest.warns(tmm.MonitoringWarning, match="failing failed at step 1.*no network"),
        start(root, sinks=sinks) as run,
    ):
        run.log({"first": 1.0})
        run.step()
        run.watch(model, tmm.Spec(tmm.activation("rms")))
        for _ in range(3):
            model(torch.randn(2, 4))
            run.step()
    assert [step for step, _ in taken] == [0, 1, 2, 3]
    assert taken[0][1] == {"first": 1.0}
    assert "activation/[root module]/rms" in taken[2][1]
    with tmm.open_run(run.path) as read:
        for step, values in taken:
            assert read.at(step) == pytest.approx(values)


def test_sinks_of_other_packages(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def __init__(self, name: str, make: Any) -> None:
            self.name, self.value, self._make = name, "package:make", make

        def load(self) -> Any:
            return self._make

    taken: list[int] = []
    points = [
        Point("good", lambda: lambda step, values: taken.append(step)),
        Point("bad", lambda: 1 / 0),
    ]
    monkeypatch.setattr("tmm.runs.delivery.entry_points", lambda group: points)
    with pytest.warns(tmm.MonitoringWarning, match="sink bad of package:make cannot be made"):
        run = start(root, sinks=["good", "bad"])
    run.log({"a": 1.0})
    run.finish()
    assert taken == [0]
    with pytest.raises(ValueError, match="'none' is offered by no package .known: bad, good."):
        start(root, sinks=["none"])
    with pytest.raises(TypeError, match="sinks: 3 is neither"):
        start(root, sinks=[3])


# What a review found


def test_an_earlier_error_of_the_session_is_not_the_runs(
    root: Path, interpreters: Interpreters
) -> None:
    code = f"""
import sys, tmm
sys.last_value = sys.last_exc = ZeroDivisionError("of a line before")
run = tmm.start_run("p", root={str(root)!r}, system_seconds=None)
run.log({{"a": 1.0}})
"""
    interpreters.run(code).check_returncode()
    (record,) = list_runs(root)
    assert (record.status, record.steps) == ("finished", 1)


@pytest.mark.parametrize("wrong", ["a", 1.5, -1, True, torch.tensor([1, 2])])
def test_wrong_counts_lose_nothing(root: Path, wrong: Any) -> None:
    with start(root) as run:
        run.log({"loss": 1.0})
        with pytest.raises((TypeError, ValueError), match="step: tokens="):
            run.step(tokens=wrong)
        run.step(tokens=3)
    with tmm.open_run(run.path) as read:
        assert read.at(0)["loss"] == 1


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((np.complex64(1 + 2j), TypeError), (np.array([1 + 2j]), ValueError)),
        *((np.ma.masked_array([1.0], mask=[True]), TypeError), (np.array([None]), ValueError)),
        *((np.array(["a"]), ValueError), (np.datetime64("2020-01-01"), TypeError)),
        *((10**400, ValueError), (torch.ones(1).to_sparse(), ValueError)),
        (torch.ones(1, device="meta"), ValueError),
    ],
)
def test_odd_numbers_are_refused_by_name(root: Path, value: Any, error: Any) -> None:
    with start(root) as run:
        with pytest.raises(error, match="log: 'x'"):
            run.log({"x": value})
        run.log({"loss": 1.0})
        run.step()
    assert find_run(run.id, root).steps == 1


def test_names_of_measured_keys_are_refused(root: Path) -> None:
    with start(root) as run:
        for key in ("activation/0/rms", "RCC x_t/a/l2norm", "attention_entropy/a", "system/x"):
            with pytest.raises(ValueError, match="are tmm's own; choose another name"):
                run.log({key: 1.0})
        run.log({"step": 1.0, "gradient": 2.0, "system_load": 3.0})


def test_times_are_of_one_step_each(root: Path) -> None:
    model = nn.Linear(2, 2)
    with start(root) as run:
        run.watch(model, tmm.Spec(tmm.activation("rms"), every=5))
        ends = []
        for _ in range(11):
            model(torch.randn(1, 2))
            time.sleep(0.02)
            run.step(tokens=100)
            ends.append(time.monotonic())
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == [0, 5, 10]
        seconds = read.series("system/step_seconds")[1]
        for value, step in zip(seconds, (5, 10), strict=True):
            # Less than the five steps since the one that was recorded before, of 20 ms at least.
            assert value < ends[step] - ends[step - 5] - 0.06
        assert read.series("system/tokens_per_second")[1] == pytest.approx(100 / seconds)


def test_steps_of_which_nothing_is_known_are_not_recorded(root: Path) -> None:
    model = nn.Linear(2, 2)
    with start(root) as run:
        tmm.instrument(model, tmm.Spec(tmm.activation("rms"), every=5), run=run)
        for step in range(11):
            with tmm.monitor(model).step(step):
                model(torch.randn(1, 2))
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == [0, 5, 10]


def test_what_was_logged_in_a_step_that_fails_is_kept(root: Path) -> None:
    model = nn.Linear(2, 2)
    with start(root) as run:
        tmm.instrument(model, tmm.Spec(tmm.activation("rms"), every=2), run=run)
        for step in range(4):
            try:
                with tmm.monitor(model).step(step):
                    model(torch.randn(1, 2))
                    run.log({"loss": step})
                    if step in (1, 2):
                        raise MemoryError("too large")
            except MemoryError:
                pass
    with tmm.open_run(run.path) as read:
        assert read.series("loss")[1].tolist() == [0, 1, 2, 3]
        assert read.series("activation/[root module]/rms")[0].tolist() == [0]


def test_a_watch_that_fails_can_be_repeated(root: Path) -> None:
    model = nn.Linear(4, 1)
    with start(root) as run:
        with pytest.raises(TypeError, match="optimizer='bad'"):
            run.watch(model, optimizer="bad")  # type: ignore[arg-type]
        run.log({"before": 1.0})
        run.step()
        run.watch(model, tmm.Spec(tmm.activation("rms")))
        model(torch.randn(2, 4))
        run.step()
        tmm.remove(model)
        run.log({"after": 1.0})
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == [0, 1, 2]
        assert "after" in read.at(2)


def test_a_recording_that_failed_is_no_finished_run(root: Path) -> None:
    run = start(root)
    run.log({"x": 1.0}, step=2**63 - 1)
    run.step()
    run.log({"x": 1.0})  # in a step that no file takes
    with pytest.raises(RuntimeError, match="does not fit in 64 bits"):
        for _ in range(100):
            run.step()
    with contextlib.suppress(RuntimeError):
        run.finish()
    record = find_run(run.id, root)
    assert record.status == "failed"
    assert "does not fit" in record.reason


def test_a_lock_outlives_who_looks_at_it(root: Path, script: Script) -> None:
    process = script(
        "import shutil; shutil.copytree(run.path, run.path.parent / 'copy')\n"
        "print('copied', flush=True); sys.stdin.read()"
    )
    name = process.stdout.readline().strip()
    assert process.stdout.readline() == "copied\n"
    assert find_run(name, root).status == "running"
    assert find_run("copy", root).status == "crashed"  # nobody holds that lock


def test_a_run_that_is_resumed_is_not_resumed_again(root: Path) -> None:
    start(root, name="a").finish()
    with start(root, resume="a") as run:
        with pytest.raises(ValueError, match="is running already"):
            start(root, resume="a")
        assert find_run("a", root).status == "running"
        run.log({"a": 1.0})


def test_a_process_of_the_same_number_does_not_revive_a_run(root: Path) -> None:
    run = start(root)
    run.finish()
    state = json.loads((run.path / "state.json").read_text())
    state |= {"status": "running", "process": os.getpid(), "later": "field"}
    (run.path / "state.json").write_text(json.dumps(state))
    assert find_run(run.id, root).status == "crashed"


@pytest.mark.parametrize(
    "info",
    [
        *({"starts": "x"}, {"starts": [5]}, {"starts": [{}], "config": [1]}),
        *({"starts": [{}], "tags": 5}, {"starts": [{"time": "2020-01-01T00:00:00"}]}),
    ],
)
def test_odd_files_break_one_run_only(root: Path, info: Any) -> None:
    start(root, name="good").finish()
    odd = start(root, name="odd")
    odd.finish()
    (odd.path / "run.json").write_text(json.dumps(info))
    assert {record.id for record in list_runs(root)} >= {odd.id}
    assert {record.name for record in list_runs(root)} >= {"good"}
    (odd.path / "state.json").write_text('{"status": "weird", "started": ""}')
    assert find_run(odd.id, root).status == "broken"


def test_other_folders_and_links_are_left_alone(root: Path, tmp_path: Path) -> None:
    run = start(root, name="mine")
    run.finish()
    other = tmp_path / "project"
    other.mkdir()
    (other / "run.json").write_text('{"scripts": {}}')
    with pytest.raises(LookupError, match="is not the folder of a run"):
        find_run(other, root)
    (root / "loop").symlink_to(root, target_is_directory=True)
    (root / "link").symlink_to(run.path, target_is_directory=True)
    assert [record.name for record in list_runs(root)] == ["mine"]
    outside = start(tmp_path / "elsewhere")
    outside.finish()
    with pytest.raises(ValueError, match="lies outside of"):
        delete_run(find_run(outside.path, root), root)
    assert outside.path.exists()


def test_the_first_nan_of_a_run_that_goes_on(root: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    spec = tmm.Spec(tmm.activation("nan_count"), every=5)
    for number, options in enumerate(({"name": "n"}, {"resume": "n"})):
        with start(root, **options) as run:
            run.log({"ppl": 1.0})
            run.watch(model, spec)
            for step in range(11):
                if (number, step) == (1, 9):
                    model[0].weight.data.fill_(float("nan"))
                output = model(torch.randn(2, 4))
                run.log({"ppl": output.exp().mean(), "loss": output.mean()})
                run.step()
        tmm.remove(model)
    with tmm.open_run(run.path) as read:
        first = tmm.analysis.first_nonfinite(read)
        assert first is not None
        assert (first.site, first.step) == ("0", 20)


def test_what_is_logged_between_steps_belongs_to_the_one_that_ended(root: Path) -> None:
    taken: list[tuple[int, dict[str, Any]]] = []

    def sink(step: int, values: Any) -> None:
        taken.append((step, dict(values)))

    with tmm.start_run("a", root=root, system_seconds=None, sinks=[sink]) as run:
        model = tmm.instrument(nn.Linear(2, 2), tmm.Spec(tmm.activation("rms"), every=2), run=run)
        monitor = tmm.monitor(model)
        run.log({"before": 1.0})  # of the step to come
        for step in range(4):
            with monitor.step(step):
                model(torch.ones(1, 2))
                run.log({"loss": 10.0 + step})
            run.log({"val/loss": 20.0 + step})
            run.log({"val/loss": 30.0 + step, "loss": 40.0 + step} if step > 1 else {})
    with tmm.open_run(run.path) as recorded:
        assert recorded.steps.tolist() == [0, 1, 2, 3]
        assert recorded.series("before")[0].tolist() == [0]
        assert recorded.series("activation/[root module]/rms")[0].tolist() == [0, 2]
        assert recorded.series("loss")[1].tolist() == [10, 11, 42, 43]
        assert recorded.series("val/loss")[1].tolist() == [20, 21, 32, 33]
        assert "system/step_seconds" in recorded.at(2)
    whole: dict[int, dict[str, Any]] = {}
    for step, values in taken:
        whole.setdefault(step, {}).update(values)
    assert {step: values["val/loss"] for step, values in whole.items()} == {
        0: 20,
        1: 21,
        2: 32,
        3: 33,
    }
    assert "activation/[root module]/rms" in whole[2]


def test_what_is_logged_after_a_step_that_failed_is_kept(root: Path) -> None:
    with tmm.start_run("a", root=root, system_seconds=None) as run:
        model = tmm.instrument(nn.Linear(2, 2), tmm.Spec(tmm.activation("rms")), run=run)
        with pytest.raises(ZeroDivisionError), tmm.monitor(model).step(3):
            model(torch.ones(1, 2))
            run.log({"loss": 1.0})
            raise ZeroDivisionError
        run.log({"val/loss": 2.0})
    with tmm.open_run(run.path) as recorded:
        assert recorded.at(3)["loss"] == 1.0
        assert recorded.at(3)["val/loss"] == 2.0
        assert "activation/[root module]/rms" not in recorded.at(3)


def test_a_measured_key_cannot_be_logged_after_its_step(root: Path) -> None:
    run = tmm.start_run("a", root=root, system_seconds=None)
    model = tmm.instrument(nn.Linear(2, 2), tmm.Spec(tmm.activation("rms")), run=run)
    with tmm.monitor(model).step(0):
        model(torch.ones(1, 2))
    with pytest.raises(ValueError, match="tmm's own"):
        run.log({"activation/[root module]/rms": 1.0})
    run.finish()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": 3}, "name=3 is not text"),
        ({"notes": ["x"]}, "notes=.* is not text"),
        ({"system_seconds": "1"}, "system_seconds='1' is not a number"),
        ({"sinks": "csv"}, r"give one: \['csv'\]"),
        ({"resume": True}, "resume=True is not the id"),
    ],
)
def test_arguments_of_another_type_are_named(
    root: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        tmm.start_run(**{"root": root, **wrong})
    assert not root.exists()


def test_samples_need_a_step_and_names(root: Path) -> None:
    with start(root) as run:
        for step, samples, error in (
            ("one", {"a": "x"}, TypeError),
            (1.7, {"a": "x"}, TypeError),
            (-1, {"a": "x"}, ValueError),
            (0, ["x"], TypeError),
        ):
            with pytest.raises(error, match="log_samples"):
                run.log_samples(step, samples)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="does not fit in 64 bits"):
            run.log({"loss": 1.0}, step=2**63)


def test_a_status_that_no_run_has_is_refused(root: Path) -> None:
    with start(root) as run:
        run.log({"loss": 1.0})
    with pytest.raises(ValueError, match="status='done' is none of running"):
        tmm.list_runs(root, status="done")  # type: ignore[arg-type]


@pytest.mark.parametrize("run", [True, "", 3])
def test_what_is_no_run_is_refused(run: Any) -> None:
    with pytest.raises(TypeError, match="run=.* is neither the path of a folder nor a run"):
        tmm.instrument(torch.nn.Linear(2, 2), tmm.Spec(tmm.activation("rms")), run=run)


def test_a_mapping_that_holds_itself_is_refused(root: Path) -> None:
    endless: dict[str, Any] = {}
    endless["a"] = endless
    with start(root) as run, pytest.raises(ValueError, match="holds itself"):
        run.log(endless)
