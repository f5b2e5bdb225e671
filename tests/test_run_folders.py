"""Folders of runs: one run at a path, runs within others, folders that vanish, disks that fill."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tmm
from tests.interpreters import Interpreters
from tmm.cli import app
from tmm.core.atomic_file import replace_text
from tmm.core.failures import MonitoringWarning
from tmm.runs import state as states
from tmm.runs.catalog import RunRecord, delete_run, find_run, list_runs

RMS = tmm.Spec(tmm.activation("rms"))
X = torch.ones(2, 3)


def network(value: float = 1.0, width: int = 2) -> nn.Linear:
    """Gives ``3 * value`` for ``X``."""
    layer = nn.Linear(3, width, bias=False)
    nn.init.constant_(layer.weight, value)
    return layer


def record(
    path: Path, steps: range, value: float = 1.0, *, spec: tmm.Spec = RMS, **options: Any
) -> Path:
    """A training that records into a path; gives where it did."""
    model = tmm.instrument(network(value), spec, run=path, **options)
    for step in steps:
        with tmm.monitor(model).step(step):
            model(X)
    folder = tmm.monitor(model).path
    tmm.remove(model)
    assert folder is not None
    return folder


def rms(path: Path) -> dict[int, float]:
    """What was recorded of each step."""
    with tmm.open_run(path) as run:
        steps, values = run.series("activation/[root module]/rms")
        return dict(zip(steps.tolist(), values.tolist(), strict=True))


def events(path: Path) -> list[tuple[str, str]]:
    with tmm.open_run(path) as run:
        return [(event.kind, event.text) for event in run.events]


def told(caught: pytest.WarningsRecorder) -> list[str]:
    """What tmm warned of, which is at lines of this file."""
    found = [item for item in caught if item.category is MonitoringWarning]
    assert {item.filename for item in found} <= {__file__}
    return [str(item.message) for item in found]


def start(root: Path, project: str = "p", **options: Any) -> tmm.LiveRun:
    return tmm.start_run(project, root=root, system_seconds=None, **options)


# One run at a path


@pytest.mark.parametrize("length", [4, 10, 12])
def test_a_second_run_at_a_path_is_recorded_beside_it(
    tmp_path: Path, length: int, recwarn: pytest.WarningsRecorder
) -> None:
    path = tmp_path / "example"
    assert record(path, range(10), 1.0) == path
    assert told(recwarn) == []
    assert record(path, range(length), 2.0) == tmp_path / "example-2"
    (text,) = told(recwarn)
    assert text == (
        f"{path} holds a run already (resume=True goes on with it); this one is recorded into"
        f" {path}-2"
    )
    assert record(path, range(2), 3.0) == tmp_path / "example-3"
    assert rms(path) == dict.fromkeys(range(10), 3.0)
    assert rms(tmp_path / "example-2") == dict.fromkeys(range(length), 6.0)
    assert ("note", text) in events(tmp_path / "example-2")
    assert {r.id: r.status for r in list_runs(tmp_path)} == dict.fromkeys(
        ("example", "example-2", "example-3"), "finished"
    )


def test_two_models_at_one_path_are_two_runs(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    first, second = (tmm.instrument(network(v), RMS, run=tmp_path / "r") for v in (1.0, 2.0))
    for step in range(3):
        for model in (first, second):
            with tmm.monitor(model).step(step):
                model(X)
    assert {r.id: r.status for r in list_runs(tmp_path)} == {"r": "running", "r-2": "running"}
    for model in (first, second):
        tmm.remove(model)
    assert "is being recorded into by another run" in told(recwarn)[0]
    assert (rms(tmp_path / "r")[2], rms(tmp_path / "r-2")[2]) == (3.0, 6.0)


PROCESS = """
import sys, torch, tmm
model = torch.nn.Linear(3, 2, bias=False)
torch.nn.init.constant_(model.weight, float(sys.argv[2]))
tmm.instrument(model, tmm.Spec(tmm.activation("rms")), run=sys.argv[1])
monitor = tmm.monitor(model)
print(monitor.path, flush=True)
sys.stdin.readline()
for step in range(10):
    with monitor.step(step):
        model(torch.ones(2, 3))
exec(sys.argv[3])
"""


def test_two_processes_at_one_path(tmp_path: Path, interpreters: Interpreters) -> None:
    path = tmp_path / "r"
    found = {}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(closing(interpreters.start(PROCESS, path, value, "", warns=False)))
            for value in (1.0, 2.0)
        ]
        for value, other in enumerate(processes, 1):
            found[Path(other.stdout.readline().strip())] = value
        assert set(found) == {path, tmp_path / "r-2"}
        assert {r.status for r in list_runs(tmp_path)} == {"running"}
        for other in processes:
            other.communicate()  # and let it go on
    for folder, value in found.items():
        assert rms(folder) == dict.fromkeys(range(10), 3.0 * value)
        assert find_run(folder).status == "finished"


@pytest.mark.parametrize(
    ("end", "status", "gaps"),
    [
        ("", "finished", []),
        ("tmm.remove(model)", "finished", []),
        ("with monitor.step(10): model(torch.ones(2, 3)); 1 / 0", "failed", ["ended by ZeroDiv"]),
        ("monitor.begin_step(10); model(torch.ones(2, 3))", "finished", ["was not ended"]),
        ("try: 1 / 0\nfinally: tmm.remove(model)", "failed", []),
        ("import os; os._exit(1)", "crashed", []),
    ],
)
def test_how_a_run_at_a_path_ends(
    tmp_path: Path, end: str, status: str, gaps: list[str], interpreters: Interpreters
) -> None:
    interpreters.run(PROCESS, tmp_path / "r", 1.0, end, warns=False)
    found = find_run(tmp_path / "r")
    assert (found.status, found.steps, found.last_step) == (status, 10, 9)
    assert found.reason == {
        "failed": "ZeroDivisionError: division by zero",
        "crashed": "its process is gone",
    }.get(status, "")
    seen = events(found.path)
    assert [kind for kind, _ in seen] == ["gap"] * len(gaps)
    assert all(text.startswith(gap) for (_, text), gap in zip(seen, gaps, strict=True))


def test_threads_that_start_at_one_path(tmp_path: Path) -> None:
    models = [network() for _ in range(6)]
    threads = [
        threading.Thread(target=tmm.instrument, args=(model, RMS, tmp_path / "r"))
        for model in models
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = {tmm.monitor(model).path for model in models}
    assert len(paths) == 6
    for model in models:
        tmm.remove(model)
    assert {r.path for r in list_runs(tmp_path)} == paths


def test_a_run_that_is_dropped_leaves_its_path(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, run=tmp_path / "r")
    with tmm.monitor(model).step(0):
        model(X)
    del model
    gc.collect()
    while find_run(tmp_path / "r").status == "running":  # its writer is about to end
        pass
    assert record(tmp_path / "r", range(1, 3), resume=True) == tmp_path / "r"
    assert sorted(rms(tmp_path / "r")) == [0, 1, 2]


# Resuming


def test_a_run_that_goes_on(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    path = tmp_path / "r"
    record(path, range(10), 1.0, resume=True)  # there is none yet
    assert record(path, range(10, 12), 2.0, resume=True) == path
    assert told(recwarn) == []
    assert rms(path) == dict.fromkeys(range(10), 3.0) | {10: 6.0, 11: 6.0}
    assert events(path) == []


@pytest.mark.parametrize("first", [7, 3, 9])
def test_a_run_that_goes_back_to_a_checkpoint(
    tmp_path: Path, first: int, recwarn: pytest.WarningsRecorder
) -> None:
    record(tmp_path / "r", range(10), 1.0)
    record(tmp_path / "r", range(first, first + 2), 2.0, resume=True)
    assert told(recwarn) == []
    kept = dict.fromkeys(range(first), 3.0)
    assert rms(tmp_path / "r") == kept | {first: 6.0, first + 1: 6.0}
    ((kind, text),) = events(tmp_path / "r")
    assert kind == "note"
    assert f"goes on from step {first}" in text
    assert "up to step 9, no longer counts" in text


def test_a_run_that_goes_back_to_its_beginning_is_told(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    record(tmp_path / "r", range(10), 1.0)
    record(tmp_path / "r", range(4), 2.0, resume=True)
    (text,) = told(recwarn)
    assert "goes on from step 0: what it had recorded from there on, up to step 9" in text
    assert rms(tmp_path / "r") == dict.fromkeys(range(4), 6.0)


def test_a_resumed_run_whose_monitor_goes_back_is_told(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for value, options in ((1.0, {"name": "n"}), (2.0, {"resume": "n"})):
        with start(tmp_path, **options) as run:
            model = tmm.instrument(network(value), RMS, run=run)
            for step in range(5 if value == 1.0 else 2):
                with tmm.monitor(model).step(step):
                    model(X)
    assert "goes on from step 0" in told(recwarn)[0]
    assert rms(run.path) == {0: 6.0, 1: 6.0}


@pytest.mark.parametrize("way", ["spec", "model", "both"])
def test_what_differs_when_a_run_goes_on_is_told(
    tmp_path: Path, way: str, recwarn: pytest.WarningsRecorder
) -> None:
    def measured(spec: tmm.Spec, width: int, step: int) -> None:
        model = tmm.instrument(network(width=width), spec, run=tmp_path / "r", resume=True)
        with tmm.monitor(model).step(step):
            model(X)
        tmm.remove(model)

    other = tmm.Spec(tmm.activation("rms", "max"))
    measured(RMS, 2, 0)
    assert told(recwarn) == []
    measured(RMS if way == "model" else other, 2 if way == "spec" else 5, 1)
    (text,) = told(recwarn)
    assert ("the spec was" in text) == (way != "model")
    assert ("the model was Linear of 1 modules and 6 parameters" in text) == (way != "spec")
    assert ("is Linear of 1 modules and 15 parameters" in text) == (way != "spec")
    assert events(tmp_path / "r") == [("note", text)]
    with tmm.open_run(tmp_path / "r") as run:
        first, second = run.info["starts"]
    assert "info" not in first
    assert set(second["info"]) == {"spec", "model"} - ({"spec", "model"} - differing(way))
    recwarn.clear()
    measured(RMS if way == "model" else other, 2 if way == "spec" else 5, 2)  # as the last time
    assert told(recwarn) == []


def differing(way: str) -> set[str]:
    return {"spec", "model"} if way == "both" else {way}


def test_a_run_of_start_run_that_goes_on_with_another_model_is_told(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for width, options in ((2, {"name": "n"}), (3, {"resume": "n"})):
        with start(tmp_path, **options) as run:
            model = run.watch(network(width=width), RMS)
            model(X).sum().backward()
            run.step()
    (text,) = told(recwarn)
    assert "the model was Linear" in text
    assert ("note", text) in events(run.path)


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    model = tmm.instrument(network(), RMS, run=tmp_path / "r")
    with pytest.raises(ValueError, match=r"resume=True: the run r is running already"):
        tmm.instrument(network(), RMS, run=tmp_path / "r", resume=True)
    with pytest.raises(ValueError, match="resume='.*': the run r is running already"):
        start(tmp_path, resume=tmp_path / "r")
    tmm.remove(model)
    with start(tmp_path) as other:
        for run in (None, other):
            with pytest.raises(ValueError, match="resume=True goes with the path of a run"):
                tmm.instrument(network(), RMS, run=run, resume=True)
    record(tmp_path / "r3", range(1))
    (tmp_path / "r3" / "run.json").unlink()
    with pytest.raises(ValueError, match="r3' cannot go on: it has no run.json"):
        tmm.instrument(network(), RMS, run=tmp_path / "r3", resume=True)
    assert record(tmp_path / "r3", range(1)) == tmp_path / "r3-2"


def test_start_run_goes_on_with_a_run_at_a_path(tmp_path: Path) -> None:
    record(tmp_path / "r", range(3))
    with start(tmp_path, resume=tmp_path / "r") as run:
        assert run.current_step == 3
        run.log({"loss": 1.0})
    with tmm.open_run(tmp_path / "r") as read:
        assert read.steps.tolist() == [0, 1, 2, 3]


# What is not a run's


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"run.json": '{"a": 1}'}, "its run.json is of another program"),
        ({"run.json": '{"starts": 3}'}, "run.json is damaged: 'starts' is no list of objects"),
        ({"run.json": "[1]"}, "holds no JSON object"),
        ({"run.json": "{"}, "is not readable as JSON"),
        ({"state.json": "{}"}, "has a state.json and no run.json"),
        ({"explain.txt": "mine"}, "has a explain.txt and no run.json"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_files_of_others_are_refused(
    tmp_path: Path, files: dict[str, str], message: str, resume: bool
) -> None:
    files = {**files, "config.yaml": "x"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        tmm.instrument(network(), RMS, run=tmp_path, resume=resume)
    assert {entry.name: entry.read_text() for entry in tmp_path.iterdir()} == files


def test_a_folder_with_other_files_may_take_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("x")
    assert record(tmp_path, range(2)) == tmp_path
    assert (tmp_path / "config.yaml").read_text() == "x"


@pytest.mark.parametrize("below", ["", "a", "a/b"])
def test_a_path_that_is_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / below
    with pytest.raises(NotADirectoryError, match="run=.*file is a file; give a folder"):
        tmm.instrument(network(), RMS, run=path)
    with pytest.raises(NotADirectoryError, match="root=.*file is a file; give a folder"):
        start(path)
    assert (tmp_path / "file").read_text() == "x"


# Runs within runs


@pytest.fixture
def nest(tmp_path: Path) -> Iterator[Path]:
    """A root whose project is itself a run, with a run that has ended and one that goes on."""
    root = tmp_path / "runs"
    record(root / "gpt", range(2))
    start(root, "gpt", name="ended").finish()
    with start(root, "gpt", name="live") as live:
        live.log({"loss": 1.0})
        live.step()
        yield root


def by_name(root: Path) -> dict[str, RunRecord]:
    return {found.name: found for found in list_runs(root)}


def test_the_list_shows_runs_within_runs(nest: Path) -> None:
    found = by_name(nest)
    assert {name: r.status for name, r in found.items()} == {
        "gpt": "finished",
        "ended": "finished",
        "live": "running",
    }
    assert [found[name].steps for name in ("gpt", "ended", "live")] == [2, 0, 1]
    assert find_run("live", nest).path.parent == nest / "gpt"


def test_deleting_a_run_leaves_those_within(nest: Path) -> None:
    result = CliRunner().invoke(app, ["delete", "gpt", "--root", str(nest), "--yes"])
    assert result.exit_code == 0, result.output
    found = by_name(nest)
    assert set(found) == {"ended", "live"}
    assert found["live"].steps == 1
    assert "deleted gpt" in result.output
    for name in ("ended", "live"):
        assert found[name].id in result.output  # what is kept is named
    assert not list((nest / "gpt").glob("*.h5"))


@pytest.mark.parametrize("name", ["ended", "live"])
def test_deleting_a_run_within_leaves_the_outer_one(nest: Path, name: str) -> None:
    found = by_name(nest)
    if name == "live":
        with pytest.raises(ValueError, match="is running; stop it first"):
            delete_run(found[name], nest)
        return
    assert delete_run(found[name], nest) == ()
    assert not found[name].path.exists()
    assert set(by_name(nest)) == {"gpt", "live"}


def test_pruning_a_root_that_is_a_run(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    record(root, range(2))
    start(root, name="ended").finish()
    (root / "notes.md").write_text("mine")
    with start(root, name="live") as live:
        command = ["runs", "prune", "--older-than", "0m", "--root", str(root), "--yes"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        assert "deleted 2 runs" in result.output
        assert set(by_name(root)) == {"live"}
        live.log({"loss": 1.0})
    assert (root / "notes.md").read_text() == "mine"
    assert by_name(root)["live"].steps == 1


def test_a_root_that_is_a_run_and_nothing_else_stays_a_folder(tmp_path: Path) -> None:
    record(tmp_path / "runs", range(1))
    (found,) = list_runs(tmp_path / "runs")
    assert delete_run(found, tmp_path / "runs") == ()
    assert list_runs(tmp_path / "runs") == ()


def test_what_a_user_keeps_in_the_folder_of_a_run_stays(tmp_path: Path) -> None:
    with start(tmp_path, sinks=["csv", "jsonl"]) as run:
        run.log({"loss": 1.0})
        run.log_samples(0, {"text": "a"})
        run.step()
    (run.path / "best.pt").write_text("weights")
    (run.path / "samples" / "mine.png").write_text("picture")
    (run.path / "plots").mkdir()
    (run.path / "link").symlink_to(tmp_path)
    (found,) = list_runs(tmp_path)
    assert delete_run(found, tmp_path) == ("best.pt", "link/", "plots/", "samples/")
    left = sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file())
    assert left == ["best.pt", "samples/mine.png"]
    assert list_runs(tmp_path) == ()


def test_all_that_a_run_writes_goes_with_it(tmp_path: Path) -> None:
    with start(tmp_path, sinks=["csv", "jsonl", "tensorboard"]) as run:
        model = run.watch(network(), RMS)
        model(X).sum().backward()
        run.log_samples(0, {"text": "a"})
        run.step()
    (found,) = list_runs(tmp_path)
    assert delete_run(found, tmp_path) == ()
    assert not run.path.exists()


def test_a_run_that_was_resumed_meanwhile_is_not_deleted(tmp_path: Path) -> None:
    start(tmp_path, name="n").finish()
    (found,) = list_runs(tmp_path)
    with start(tmp_path, resume="n") as run:
        with pytest.raises(ValueError, match="is running; stop it first"):
            delete_run(found, tmp_path)
        run.log({"loss": 1.0})
    assert find_run("n", tmp_path).steps == 1


# Folders that vanish


def fails_at_step_2(model: nn.Module, message: str) -> None:
    """The step that is recorded next cannot be, which is told at the one after it at the latest."""
    monitor = tmm.monitor(model)
    with pytest.raises(OSError, match=message) as raised:
        with monitor.step(2):
            model(X)
        with monitor.step(3):
            model(X)
    assert "step 2" in str(raised.value)
    tmm.remove(model)


@pytest.mark.parametrize("way", ["deleted", "moved", "replaced"])
def test_a_folder_that_vanishes_is_noticed_at_the_next_step(tmp_path: Path, way: str) -> None:
    path = tmp_path / "r"
    model = tmm.instrument(network(), RMS, run=path)
    monitor = tmm.monitor(model)
    for step in range(2):
        with monitor.step(step):
            model(X)
    if way == "moved":
        path.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(path)
    if way == "replaced":
        record(path, range(7))
    before = rms(path) if way == "replaced" else {}
    fails_at_step_2(model, "was deleted or moved while it was recorded")
    if way == "replaced":
        assert rms(path) == before
        assert find_run(path).status == "finished"
    elif way == "moved":
        assert sorted(rms(tmp_path / "elsewhere")) == [0, 1]
    assert path.exists() == (way == "replaced")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_noticed_at_the_next_step(tmp_path: Path, kept: float) -> None:
    """HDF5 would go on to write where its file ends no longer."""
    model = tmm.instrument(network(), RMS, run=tmp_path / "r")
    monitor = tmm.monitor(model)
    for step in range(2):
        with monitor.step(step):
            model(X)
    (path,) = (tmp_path / "r").glob("*.h5")
    os.truncate(path, int(kept * path.stat().st_size))
    size = path.stat().st_size
    fails_at_step_2(model, "was cut off while it was recorded")
    assert path.stat().st_size == size


def wait_for_a_file(path: Path) -> None:
    """Until the thread that writes has made one, which takes long on a busy machine."""
    end = time.monotonic() + 60
    while not list(path.glob("*.h5")) and time.monotonic() < end:
        time.sleep(0.01)


def test_a_folder_that_vanishes_from_a_run_of_start_run(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.log({"loss": 1.0})
    run.step()
    wait_for_a_file(run.path)
    shutil.rmtree(run.path)
    with pytest.raises(OSError, match="was deleted or moved"):
        for _ in range(3):
            run.log({"loss": 1.0})
            run.step()
    run.finish()
    assert not run.path.exists()


def test_a_folder_that_vanishes_before_the_end(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.log({"loss": 1.0})
    run.step()
    wait_for_a_file(run.path)
    shutil.rmtree(run.path)
    with pytest.raises(OSError, match="was deleted or moved"):
        run.finish()
    assert run.is_finished


# Programs that go to another folder


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program is in the folder ``here``; gives where it may go to."""
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "elsewhere"


def test_a_run_of_a_program_that_goes_to_another_folder(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sinks: list[Any] = [
        "csv",
        tmm.sinks.JSONLinesSink("lines.jsonl"),
        tmm.sinks.TensorBoardSink("board"),
    ]
    run = start(Path("runs"), sinks=sinks)
    model = run.watch(network(), tmm.Spec(tmm.activation("rms"), every=1))
    for step in range(4):
        model(X)
        run.log_samples(step, {"text": "a"})
        run.step()
        if step == 1:
            monkeypatch.chdir(elsewhere)
    run.finish()
    here = elsewhere.with_name("here")
    assert run.path.is_relative_to(here / "runs")
    assert sorted(rms(run.path)) == [0, 1, 2, 3]
    assert find_run(run.path).status == "finished"
    with tmm.open_run(run.path) as recorded:
        assert recorded.sample_steps == [0, 1, 2, 3]
        assert "activation" in recorded.text("explain.txt")
    assert "\n3,activation" in (run.path / "values.csv").read_text()
    assert len((here / "lines.jsonl").read_text().splitlines()) == 4
    assert list((here / "board").iterdir())
    assert not list(elsewhere.iterdir())


def test_a_run_that_is_resumed_and_goes_to_another_folder(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(Path("runs"), name="first")
    first.log({"loss": 1.0})
    first.finish()
    run = start(Path("runs"), resume="first")
    run.log({"loss": 2.0})
    run.step()
    monkeypatch.chdir(elsewhere)
    run.log({"loss": 3.0})
    run.finish()
    with tmm.open_run(first.path) as recorded:
        assert recorded.series("loss")[1].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"trace": "trace"}])
def test_a_run_at_a_path_of_a_program_that_goes_to_another_folder(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    if options.get("resume"):
        record(Path("example"), range(1))
    compiled = torch.compile(network(), backend="eager")
    model = tmm.instrument(compiled, RMS, run="example", **options)
    monkeypatch.chdir(elsewhere)
    for step in range(1, 3):
        with tmm.monitor(model).step(step):
            model(X)
    here = elsewhere.with_name("here")
    assert tmm.monitor(model).path == here / "example"
    tmm.remove(model)
    assert sorted(rms(here / "example"))[-2:] == [1, 2]
    assert not list(elsewhere.iterdir())
    if "trace" in options:
        assert list((here / "trace").iterdir())


def test_a_run_is_read_where_it_was_found(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(Path("example"), range(2))
    with tmm.open_run("example") as run:
        monkeypatch.chdir(elsewhere)
        assert run.series("activation/[root module]/rms")[1].tolist() == [3.0, 3.0]
        assert run.state is not None
        assert "activation" in run.text("explain.txt")
        assert run.path == elsewhere.with_name("here") / "example"


# Full disks


class FullDisk:
    """A disk that is full but for what the lock of a run keeps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        monkeypatch.setattr(states, "replace_text", self.replace_text)
        monkeypatch.setattr("tmm.runtime.store.segment_writer.GrowingDataset.append", self.append)

    def replace_text(self, path: Path, text: str) -> None:
        if self.is_full and (path.parent / states.LOCK_NAME).stat().st_size > 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_text(path, text)

    def append(self, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize("way", ["path", "run", "watched"])
def test_a_full_disk_leaves_a_failed_run_that_can_go_on(
    tmp_path: Path, way: str, interpreters: Interpreters
) -> None:
    code = f"""
import errno, resource, signal, sys
from pathlib import Path
import torch, tmm
from tmm.runs.catalog import find_run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
root, way = Path({str(tmp_path)!r}), {way!r}
spec = tmm.Spec(tmm.activation("histogram", "rms"))
def begin(**resume):
    model, run = torch.nn.Linear(3, 2, bias=False), None
    if way == "path":
        tmm.instrument(model, spec, run=root / "r", **resume)
    else:
        resume = {{"resume": find_run(root / "r").path}} if resume else {{}}
        run = tmm.start_run("p", root=root, system_seconds=None, **resume)
        if not resume:
            (root / "r").symlink_to(run.path)
    if way == "watched":
        run.watch(model, spec)
    return model, run
def train(model, run, steps):
    for step in steps:
        if way == "path":
            with tmm.monitor(model).step(step):
                model(torch.ones(2, 3))
        else:
            if way == "watched":
                model(torch.ones(2, 3))
            run.log({{f"loss{{step % 400}}": step, "at": step}})
            run.step()
model, run = begin()
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, resource.RLIM_INFINITY))
try:
    train(model, run, range(5000))
except OSError as error:
    assert error.errno == errno.EFBIG, error
record = find_run(root / "r")
assert record.status == "failed", record
assert "cannot write step" in record.reason, record
assert record.steps > 2
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
again, other = begin(resume=True)
train(again, other, range(record.last_step + 1, record.last_step + 4))
for ended in (run, other):
    if ended is not None:
        ended.finish()
if way == "path":
    tmm.remove(model)
    tmm.remove(again)
after = find_run(root / "r")
assert (after.status, after.steps) == ("finished", record.steps + 3), (record, after)
"""
    done = interpreters.run(code, warns=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("way", ["path", "run"])
def test_what_became_of_a_run_fits_on_a_full_disk(
    tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch)
    if way == "path":
        model = tmm.instrument(network(), RMS, run=tmp_path / "r")
        disk.is_full = True
        with pytest.raises(OSError, match="No space left"):
            for step in range(2):
                with tmm.monitor(model).step(step):
                    model(X)
        found = find_run(tmp_path / "r")
    else:
        run = start(tmp_path)
        disk.is_full = True
        run.log({"loss": 1.0})
        with pytest.raises(OSError, match="No space left"):
            for _ in range(3):
                run.log({"loss": 1.0})
                run.step()
        found = find_run(run.path)
    assert found.status == "failed"
    assert "No space left" in found.reason
    monkeypatch.undo()
    with start(tmp_path, resume=found.path) as again:
        again.log({"loss": 1.0})
    assert find_run(found.path).status == "finished"


def test_a_disk_without_any_room_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = start(tmp_path, name="n")
    run.log({"loss": 1.0})
    monkeypatch.setattr(states, "replace_text", full)
    with pytest.raises(OSError, match="No space left"):
        run.finish()
    assert find_run("n", tmp_path).status == "crashed"  # its state is the last that was written
    monkeypatch.undo()
    with start(tmp_path, resume="n") as again:
        again.log({"loss": 2.0})
    assert find_run("n", tmp_path).steps == 2


def test_a_disk_that_is_full_from_the_start_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for target in ("tmm.runs.state.replace_text", "tmm.runtime.store.run_writer.replace_text"):
        monkeypatch.setattr(target, full)
        with pytest.raises(OSError, match="No space left") as kept:
            tmm.instrument(network(), RMS, run=tmp_path / "r")
        with pytest.raises(OSError, match="No space left") as kept_too:
            start(tmp_path)
        monkeypatch.undo()
        assert record(tmp_path / "r", range(1), resume=True) == tmp_path / "r"
        del kept, kept_too
        shutil.rmtree(tmp_path / "r")


def test_a_run_keeps_its_folder_as_it_was_before(tmp_path: Path) -> None:
    """Its state is JSON, and its lock holds nothing that anybody reads."""
    folder = record(tmp_path / "r", range(2))
    assert {entry.name for entry in folder.iterdir()} == {
        *("run.json", "state.json", "alive.lock", "explain.txt", "metrics-001.h5")
    }
    assert json.loads((folder / "state.json").read_text())["status"] == "finished"
