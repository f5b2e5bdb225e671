"""Sinks: each backend's own reader finds what the run holds, and none stops a training."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tmm
from tests.interpreters import Interpreters
from tests.private_wandb import private_wandb
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runs.delivery import RunInfo, RunSink, Sinks, Value
from tmm.runs.live import LiveRun
from tmm.sinks import tensorboard
from tmm.sinks.mlflow import key_of, metric_name

Series = dict[str, dict[int, Any]]

ODD_KEYS = ("loss (nats), 50 %", 'a"b', "a//b", "ünï", "line\nbreak", "../up", "100:5B", "x" * 300)


@pytest.fixture(scope="module", autouse=True)
def private_backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Places of this module's own; backends take long to set up one."""
    folder = tmp_path_factory.mktemp("backends")
    with private_wandb(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)
        yield


def start(root: Path, *sinks: Any, **options: Any) -> LiveRun:
    given = {"project": "p", "root": root, "system_seconds": None, "sinks": sinks}
    return tmm.start_run(**{**given, **options})


def train(run: LiveRun, steps: range) -> None:
    """Numbers of every kind, and a histogram each second step."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    run.watch(model, tmm.Spec(tmm.activation("rms", "histogram"), every=2))
    for step in steps:
        run.log({"loss": step / 3, "odd": (math.nan, math.inf, -math.inf)[step % 3]})
        run.log({"losses": dict.fromkeys(ODD_KEYS, step + 1e-12)})
        model(torch.randn(8, 4) * 100)
        assert run.step() == step + 1
    tmm.remove(model)


def recorded(path: Path, *, histograms: bool = True) -> Series:
    with tmm.open_run(path) as run:
        series = {key: run.series(key) for key in run.keys(None)}
    return {
        key: dict(zip(steps.tolist(), values.tolist(), strict=True))
        for key, (steps, values) in series.items()
        if histograms or values.ndim == 1
    }


def check_same(found: Series, expected: Series) -> None:
    assert found.keys() == expected.keys()
    for key, series in expected.items():
        assert list(found[key]) == list(series), key
        np.testing.assert_array_equal(
            [found[key][step] for step in series], list(series.values()), err_msg=key
        )


# What each backend's own reader finds


def read_csv(path: Path) -> Series:
    series: Series = {}
    with (path / "values.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            at = series.setdefault(row["key"], {})
            assert int(row["step"]) not in at
            at[int(row["step"])] = float(row["value"])
    return series


def read_jsonl(path: Path) -> Series:
    series: Series = {}
    for line in (path / "values.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=pytest.fail)
        for key, value in row["values"].items():
            at = series.setdefault(key, {})
            assert row["step"] not in at
            at[row["step"]] = float(value) if isinstance(value, str) else value
    return series


def read_tensorboard(path: Path) -> Series:
    # The one that TensorBoard shows: that of the same name without "plugin" purges no numbers that
    # are tensors when a run goes back.
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(path / "tensorboard"), {"tensors": 0})
    events.Reload()
    series: Series = {}
    for tag in events.Tags()["tensors"]:
        if tag == "run/text_summary":
            continue
        found = events.Tensors(tag)
        shown = ((event.step, make_ndarray(event.tensor_proto)) for event in found)
        series[tag] = {
            step: array.item() if array.ndim == 0 else _whole(array) for step, array in shown
        }
        assert len(series[tag]) == len(found)
    return series


def _whole(bins: Any) -> list[float]:
    """All counts from rows of left edge, right edge and count, without empty bins at the ends."""
    edges = tmm.HISTOGRAM_EDGES.copy()
    edges[[0, -1]] = -(2.0**17), 2.0**17
    first = edges.tolist().index(bins[0, 0])
    assert bins[:, 0].tolist() == edges[first : first + len(bins)].tolist()
    assert bins[:, 1].tolist() == edges[first + 1 : first + 1 + len(bins)].tolist()
    counts = np.zeros(len(edges) - 1)
    counts[first : first + len(bins)] = bins[:, 2]
    return list(counts.tolist())


def read_wandb(path: Path) -> Series:
    series: Series = {}
    for file in wandb_files(path.name):
        for record in finished_records(file):
            if record.WhichOneof("record_type") != "history":
                continue
            row: dict[str, Any] = {}
            for item in record.history.item:
                at = row
                for name in item.nested_key[:-1]:
                    at = at.setdefault(name, {})
                at[item.nested_key[-1]] = json.loads(item.value_json)
            step = row["_step"]
            for key, value in row.items():
                if not key.startswith("_"):
                    assert step not in series.setdefault(key, {})
                    series[key][step] = value["values"] if isinstance(value, dict) else value
    return series


def wandb_files(run_id: str) -> list[Path]:
    folder = Path(os.environ["WANDB_DIR"], "wandb")
    return sorted(folder.glob(f"offline-run-*-{run_id}/*.wandb"))


def finished_records(file: Path) -> list[Any]:
    """Those of a run that has finished: W&B's own process may write for a moment after that."""
    end = time.monotonic() + 20
    while True:
        records = list(wandb_records(file))
        if any(r.HasField("exit") for r in records) or time.monotonic() > end:
            return records
        time.sleep(0.05)


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a file of W&B: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_mlflow(path: Path) -> Series:
    from mlflow import MlflowClient

    (run,) = mlflow_runs(path)
    series: Series = {}
    for name in run.data.metrics:
        found = MlflowClient().get_metric_history(run.info.run_id, name)
        series[name] = {metric.step: metric.value for metric in found}
        assert len(series[name]) == len(found)
    return series


def mlflow_runs(path: Path) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("p")
    found = client.search_runs([experiment.experiment_id], f"tags.`tmm.run` = '{path.name}'")
    return list(found)


def in_mlflow(series: Series) -> Series:
    """As its database keeps them."""
    largest = sys.float_info.max
    return {
        metric_name(key): {
            step: value if math.isnan(value) else min(max(value, -largest), largest)
            for step, value in values.items()
        }
        for key, values in series.items()
    }


@dataclass(frozen=True)
class Backend:
    """A sink and its backend's own reader.

    ``kept`` is what becomes of values there. Of a step that comes again, the backend has the last
    record if it ``replaces`` what it holds: the step before ("last"), any ("earlier") or none.
    ``survives_a_kill`` tells that a process need not end for its values to be there.
    """

    sink: Callable[..., RunSink]
    read: Callable[[Path], Series]
    has_histograms: bool = True
    replaces: Literal["none", "last", "earlier"] = "earlier"
    survives_a_kill: bool = True
    kept: Callable[[Series], Series] = dict

    def expected(self, path: Path) -> Series:
        """What it is to hold of the run."""
        return self.kept(recorded(path, histograms=self.has_histograms))

    def check(self, path: Path) -> None:
        """It holds what the run holds."""
        check_same(self.read(path), self.expected(path))

    def check_resumed(self, path: Path) -> None:
        """The same of a run that repeats steps, with the same numbers."""
        found, expected = self.read(path), self.expected(path)
        if self.replaces != "earlier":
            for series in (found, expected):
                series.pop("system/step_seconds")  # a start has none at its first step
            steps = {key: list(series) for key, series in expected.items()}
            assert {key: list(series) for key, series in found.items()} == steps
            logged = [key for key in steps if key.startswith(("loss", "odd"))]
            found, expected = ({key: all_[key] for key in logged} for all_ in (found, expected))
        check_same(found, expected)


BACKENDS = {
    "csv": Backend(tmm.sinks.CSVSink, read_csv, has_histograms=False),
    "jsonl": Backend(tmm.sinks.JSONLinesSink, read_jsonl),
    "tensorboard": Backend(tmm.sinks.TensorBoardSink, read_tensorboard),
    "wandb": Backend(tmm.sinks.WandbSink, read_wandb, replaces="last", survives_a_kill=False),
    "mlflow": Backend(
        *(tmm.sinks.MLflowSink, read_mlflow), has_histograms=False, replaces="none", kept=in_mlflow
    ),
}
each = pytest.mark.parametrize("name", BACKENDS)
Scenario = Callable[[Path, Interpreters], Path]


@pytest.fixture(scope="module")
def run_of(
    tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters
) -> Callable[[Scenario], Path]:
    """The run of a scenario, which all backends get at once."""
    return functools.cache(lambda scenario: scenario(tmp_path_factory.mktemp("runs"), interpreters))


def whole(root: Path, _: Interpreters) -> Path:
    with start(root, *BACKENDS, config={"lr": 0.1}, tags=["a b"], name="n") as run:
        train(run, range(7))
    assert len(recorded(run.path)["activation/1/histogram"]) == 4
    return run.path


@each
def test_it_holds_what_the_run_holds(name: str, run_of: Callable[[Scenario], Path]) -> None:
    BACKENDS[name].check(run_of(whole))


def resumed(root: Path, _: Interpreters) -> Path:
    with start(root, *BACKENDS) as run:
        train(run, range(6))
    with start(root, *BACKENDS, resume=run.id, step=3) as again:
        torch.manual_seed(0)
        train(again, range(3, 9))
    assert list(recorded(run.path)["loss"]) == list(range(9))
    return run.path


@each
def test_a_resumed_run_goes_on_without_duplicates(
    name: str, run_of: Callable[[Scenario], Path]
) -> None:
    BACKENDS[name].check_resumed(run_of(resumed))


def repeated(root: Path, _: Interpreters) -> Path:
    model = nn.Linear(2, 2)
    with start(root, *BACKENDS) as run:
        tmm.instrument(model, tmm.Spec(tmm.activation("rms")), run=run)
        for step, scale in ((0, 1.0), (1, 2.0), (1, 3.0), (2, 4.0)):
            with tmm.monitor(model).step(step):
                model(torch.full((1, 2), scale))
                run.log({"loss": scale})
    return run.path


def extended(root: Path, _: Interpreters) -> Path:
    model = nn.Linear(2, 2)
    with start(root, *BACKENDS) as run:
        tmm.instrument(model, tmm.Spec(tmm.activation("rms", "histogram"), every=2), run=run)
        run.log({"early": 1.0})
        for step in range(4):
            with tmm.monitor(model).step(step):
                model(torch.ones(1, 2))
                run.log({"loss": step} if step != 1 else {})
            run.log({"validation": {"loss": step, "accuracy": 1.0}} if step != 2 else {})
    return run.path


@each
def test_what_is_added_to_a_step_that_has_ended(
    name: str, run_of: Callable[[Scenario], Path]
) -> None:
    assert list(recorded(run_of(extended))["validation/loss"]) == [0, 1, 3]
    BACKENDS[name].check(run_of(extended))


@each
def test_a_step_that_is_recorded_again(name: str, run_of: Callable[[Scenario], Path]) -> None:
    backend = BACKENDS[name]
    found = backend.read(run_of(repeated))
    assert found["loss"] == {0: 1.0, 1: 2.0 if backend.replaces == "none" else 3.0, 2: 4.0}
    if backend.replaces != "none":
        backend.check(run_of(repeated))


def selected(root: Path, _: Interpreters) -> Path:
    with start(root, *(backend.sink(keys="loss$") for backend in BACKENDS.values())) as run:
        train(run, range(3))
    return run.path


@each
def test_keys_select(name: str, run_of: Callable[[Scenario], Path]) -> None:
    path, backend = run_of(selected), BACKENDS[name]
    check_same(backend.read(path), {"loss": recorded(path)["loss"]})
    with pytest.raises(ValueError, match=r"keys='\(' is no regular expression"):
        backend.sink(keys="(")


def failed(root: Path, _: Interpreters) -> Path:
    with pytest.raises(ZeroDivisionError), start(root, *BACKENDS) as run:
        run.log({"loss": 1.0})
        raise ZeroDivisionError
    return run.path


@each
def test_it_holds_what_a_run_that_fails_has_recorded(
    name: str, run_of: Callable[[Scenario], Path]
) -> None:
    BACKENDS[name].check(run_of(failed))


def left_by_a_process(
    root: Path, interpreters: Interpreters, names: Iterable[str], steps: int, end: str
) -> Path:
    code = f"""
import os, tmm
run = tmm.start_run("p", root={str(root)!r}, system_seconds=None, sinks={[*names]!r})
for step in range({steps}):
    run.log({{"loss": step / 3}})
    run.step()
{end}
"""
    process = interpreters.run(code)
    assert process.returncode == (-signal.SIGKILL if end else 0), process.stderr
    assert "MonitoringWarning" not in process.stderr
    (path,) = (root / "p").iterdir()
    return path


def exited(root: Path, interpreters: Interpreters) -> Path:
    return left_by_a_process(root, interpreters, BACKENDS, 3, "")


@each
def test_a_process_that_just_ends_flushes_it(name: str, run_of: Callable[[Scenario], Path]) -> None:
    BACKENDS[name].check(run_of(exited))


SURVIVING = [name for name, backend in BACKENDS.items() if backend.survives_a_kill]


def killed(root: Path, interpreters: Interpreters) -> Path:
    path = left_by_a_process(root, interpreters, SURVIVING, 50, "os.kill(os.getpid(), 9)")
    for file, text in (("values.csv", b"49,lo"), ("values.jsonl", b'{"step": 49, "val')):
        with (path / file).open("ab") as opened:
            opened.write(text)  # what a disk may hold of a line
    with start(root, *SURVIVING, resume=path.name, step=0) as run:
        for step in range(60):
            run.log({"loss": step / 3})
            run.step()
    return path


@pytest.mark.parametrize("name", SURVIVING)
def test_what_a_killed_process_had_delivered_is_gone_on_with(
    name: str, run_of: Callable[[Scenario], Path]
) -> None:
    BACKENDS[name].check_resumed(run_of(killed))


# What is of one backend


def test_mlflow_knows_the_run(run_of: Callable[[Scenario], Path]) -> None:
    (found,) = mlflow_runs(run_of(whole))
    assert (found.info.status, found.info.run_name) == ("FINISHED", "n")
    assert found.data.params == {"lr": "0.1"}
    assert "a b" in found.data.tags
    assert len(mlflow_runs(run_of(resumed))) == 1
    assert mlflow_runs(run_of(failed))[0].info.status == "FAILED"


def test_wandb_knows_the_run(run_of: Callable[[Scenario], Path]) -> None:
    assert json.loads(json.dumps(wandb_about(run_of(whole)))) == {
        "project": "p",
        "display_name": "n",
        "tags": ["a b"],
        "config": {"lr": 0.1},
    }
    assert wandb_exit_code(run_of(whole)) == 0
    assert wandb_exit_code(run_of(failed)) == 1


def wandb_about(path: Path) -> dict[str, Any]:
    (file,) = wandb_files(path.name)
    run = next(r.run for r in finished_records(file) if r.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    config.pop("_wandb")
    names = {"project": run.project, "display_name": run.display_name, "tags": list(run.tags)}
    return {**names, "config": config}


def wandb_exit_code(path: Path) -> int:
    (file,) = wandb_files(path.name)
    (code,) = (r.exit.exit_code for r in finished_records(file) if r.HasField("exit"))
    return int(code)


class Clock:
    """The module ``time``, in which time passes by sleeping only."""

    now = 1_000_000_000.25

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_event_files_of_one_second_are_read_in_the_order_of_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard counts a process's files in their names, and sorts the names as text."""
    from tensorboard.summary.writer import event_file_writer

    root, clock = tmp_path / "runs", Clock()
    for module in (event_file_writer, tensorboard):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(9))
    with start(root, "tensorboard") as run:
        for step in range(4):
            run.log({"loss": step})
            run.step()
    with start(root, "tensorboard", resume=run.id, step=2) as again:
        for step in range(2, 6):
            again.log({"loss": -step})
            again.step()
    assert list(read_tensorboard(run.path)["loss"].values()) == [0, 1, -2, -3, -4, -5]
    assert clock.now == 1_000_000_001


def test_files_of_ones_own(tmp_path: Path) -> None:
    paths = [tmp_path / "logs" / name for name in ("a.csv", "b.csv")]
    for _ in range(2):  # the second run writes them anew
        with start(tmp_path / "runs", *map(tmm.sinks.CSVSink, paths)) as run:
            run.log({"loss": 1.0})
    assert [path.read_text() for path in paths] == ["step,key,value\n0,loss,1.0\n"] * 2
    paths[0].write_text("something else\n")
    with (
        pytest.warns(tmm.MonitoringWarning, match="CSVSink cannot be opened.*give another path"),
        start(tmp_path / "runs", tmm.sinks.CSVSink(paths[0]), resume=run.id) as again,
    ):
        again.log({"loss": 1.0})
    assert paths[0].read_text() == "something else\n"


def test_a_run_of_wandb_that_the_user_started(tmp_path: Path) -> None:
    import wandb

    with wandb.init(project="own", id="own", reinit="create_new") as own:
        with start(tmp_path / "runs", tmm.sinks.WandbSink(run=own)) as run:
            run.log({"loss": 1.0})
        own.log({"mine": 2.0}, step=1)
    (file,) = wandb_files("own")
    kinds = [record.WhichOneof("record_type") for record in finished_records(file)]
    assert (kinds.count("history"), kinds.count("exit")) == (2, 1)


def test_programs_own_runs_of_wandb_and_mlflow_are_left_alone(tmp_path: Path) -> None:
    import mlflow
    import wandb

    with start(tmp_path / "runs", "wandb", "mlflow") as run:
        run.log({"loss": 1.0})
        assert wandb.run is None
        assert mlflow.active_run() is None


@given(st.text(st.characters(exclude_categories=()), min_size=1, max_size=60))
def test_names_in_mlflow_are_valid_and_unique(key: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    name = metric_name(key)
    _validate_metric_name(name)
    if not name[-33:].startswith(":") or len(name) < 250:
        assert key_of(name) == key


def test_names_in_mlflow_keep_what_it_takes() -> None:
    assert metric_name("activation/h.0.attn/rms") == "activation/h.0.attn/rms"
    assert metric_name("RCC (W_t-W_0)x_t/a") == "RCC :28W_t-W_0:29x_t/a"
    assert metric_name("a//b") == "a:2F:2Fb"
    assert len({metric_name("x" * length) for length in range(240, 300)}) == 60


# Faults


class Troubled:
    """A sink that raises at one of its moments."""

    def __init__(self, *moments: object) -> None:
        self.moments = moments
        self.steps: list[int] = []
        self.closed: list[str] = []

    def fail(self, moment: object) -> None:
        if moment in self.moments:
            raise OSError(f"trouble at {moment}")

    def open(self, run: RunInfo) -> Troubled:
        self.fail("open")
        return self

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        self.fail(step)
        self.steps.append(step)

    def close(self, status: str) -> None:
        self.closed.append(status)
        self.fail("close")


@pytest.mark.parametrize(
    ("moments", "message", "steps", "closed"),
    [
        (("open",), "Troubled cannot be opened and gets nothing: OSError: trouble", [], []),
        ((2,), "Troubled failed at step 2 and gets nothing more", [0, 1], ["finished"]),
        ((2, "close"), "Troubled failed at step 2", [0, 1], ["finished"]),
        (("close",), "Troubled could not be closed", [0, 1, 2, 3, 4], ["finished"]),
    ],
)
def test_troubles_are_said_once_and_stop_nothing(
    tmp_path: Path, moments: Any, message: str, steps: list[int], closed: list[str]
) -> None:
    sink, other = Troubled(*moments), Troubled()
    with (
        pytest.warns(tmm.MonitoringWarning, match=message) as caught,
        start(tmp_path / "runs", sink, other) as run,
    ):
        for step in range(5):
            run.log({"loss": step})
            run.step()
    assert len(caught) == 1
    assert (sink.steps, sink.closed) == (steps, closed)
    assert (other.steps, other.closed) == ([0, 1, 2, 3, 4], ["finished"])
    with tmm.open_run(run.path) as read:
        assert read.steps.tolist() == [0, 1, 2, 3, 4]
        assert read.state is not None
        assert read.state.status == "finished"


@pytest.mark.filterwarnings("error::tmm.MonitoringWarning")
def test_warnings_that_are_errors_stop_nothing(tmp_path: Path) -> None:
    with start(tmp_path / "runs", *map(Troubled, ("open", 1, "close"))) as run:
        for step in range(3):
            run.log({"loss": step})
            run.step()
    with tmm.open_run(run.path) as read:
        assert len(read.steps) == 3


@pytest.mark.parametrize("name", ["wandb", "mlflow", "tensorboard"])
def test_a_missing_package_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with (
        pytest.warns(tmm.MonitoringWarning, match=rf"'tmm-compile\[{name}\]'") as caught,
        start(tmp_path / "runs", name, "csv") as run,
    ):
        run.log({"loss": 1.0})
    assert len(caught) == 1
    check_same(read_csv(run.path), recorded(run.path))


def test_tmm_imports_no_backend() -> None:
    code = "import sys, tmm; print({'wandb', 'mlflow', 'tensorboard'} & sys.modules.keys())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def records(steps: range) -> Iterator[StepRecord]:
    infos = (KeyInfo("loss", "loss", "loss", 0, "last"),)
    return (StepRecord(step, (Table(infos, np.array([float(step)])),)) for step in steps)


def info(path: Path) -> RunInfo:
    return RunInfo(path, "id", "p", "n", {})


def test_a_slow_sink_delays_nobody_and_misses_steps(tmp_path: Path) -> None:
    go, quick = threading.Event(), Troubled()
    slow = Troubled()
    fast = slow.__call__

    class Waiting:
        def __call__(self, step: int, values: Mapping[str, Value]) -> None:
            go.wait(60)
            fast(step, values)

    sinks = Sinks([("slow", Waiting()), ("quick", quick)], info(tmp_path), capacity=10)
    with pytest.warns(tmm.MonitoringWarning, match="slow is slower than the training: 10 steps"):
        for record in records(range(100)):
            sinks.take(record)
            while len(quick.steps) <= record.step:
                time.sleep(0.001)
    go.set()
    with pytest.warns(tmm.MonitoringWarning, match="slow was slow and misses (89|90) steps"):
        sinks.close("finished")
    assert quick.steps == list(range(100))
    assert slow.steps == list(range(len(slow.steps)))


def test_a_sink_that_hangs_ends_with_the_run(tmp_path: Path) -> None:
    go = threading.Event()
    sinks = Sinks([("hanging", lambda step, values: go.wait(60))], info(tmp_path))  # type: ignore[func-returns-value]
    for record in records(range(3)):
        sinks.take(record)
    begin = time.monotonic()
    with pytest.warns(tmm.MonitoringWarning, match="hanging was not done 0 s after the end"):
        sinks.close("finished", seconds=0.1)
    assert time.monotonic() - begin < 10
    go.set()


def test_what_a_sink_changes_is_its_own(tmp_path: Path) -> None:
    def spoil(step: int, values: Any) -> None:
        for key in values:
            values[key] *= 0

    with start(tmp_path / "runs", spoil, "jsonl") as run:
        train(run, range(3))
    assert sum(recorded(run.path)["activation/0/histogram"][0]) == 32
    check_same(read_jsonl(run.path), recorded(run.path))


def test_classes_are_no_sinks(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="CSVSink is a class; give what it makes"):
        start(tmp_path / "runs", tmm.sinks.CSVSink)
    assert not os.listdir(tmp_path)
