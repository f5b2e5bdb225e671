"""The training script: every option does what it says, and tmm changes nothing of the training."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import tmm
from tests.interpreters import Interpreters
from tmm.runs.catalog import RunRecord, list_runs

SCRIPT = Path(__file__).parent.parent / "examples" / "train.py"


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


script: Any = _script()
ONE = script.Processes(0, 1, torch.device("cpu"))


@pytest.fixture(autouse=True)
def algorithms_as_they_were() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


def settings(folder: Path, **options: Any) -> Any:
    """A training of a second at most."""
    tiny = {"width": 16, "layers": 1, "length": 8, "batch_size": 4, "steps": 10, "warmup": 2}
    often = {"validate_every": 4, "save_every": 3, "monitor_every": 1, "debug": True}
    return script.Settings(**{"output": str(folder), "device": "cpu", **tiny, **often, **options})


def train(folder: Path, **options: Any) -> Any:
    return script.train(settings(folder, **options), ONE)


Python = Callable[..., None]


@pytest.fixture
def python(interpreters: Interpreters) -> Python:
    """Runs a program in processes that compute with as many threads as this one."""
    threads = f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"

    def run(program: str, *arguments: str, ranks: int = 0, status: int = 0) -> None:
        if ranks:
            process = interpreters.run_ranks(ranks, threads + program, *arguments)
        else:
            process = interpreters.run(threads + program, *arguments)
        assert process.returncode == status, process.stderr

    return run


RUN_FILE = """
import runpy, sys
sys.argv[:] = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def the_run(folder: Path) -> RunRecord:
    (record,) = list_runs(folder / "runs")
    return record


def recorded(folder: Path) -> dict[str, dict[int, float]]:
    """All but what is of the process: of the system, and where one has begun."""
    with tmm.open_run(the_run(folder).path) as run:
        series = {key: run.series(key) for key in run.keys(r"(?!system/|step/started$)")}
    return {
        key: dict(zip(steps.tolist(), values.tolist(), strict=True))
        for key, (steps, values) in series.items()
    }


def check_same_weights(first: nn.Module, second: nn.Module | dict[str, Tensor]) -> None:
    others = second.state_dict() if isinstance(second, nn.Module) else second
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, others[name]), name


def newest(folder: Path) -> dict[str, Any]:
    path = script.checkpoints(settings(folder))[-1]
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


# Resuming


DEMANDING = {"deterministic": True, "accumulate": 3, "schedule": "plateau", "steps": 22}
"""Eight batches and three steps an epoch, of which the last has a smaller window."""


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "float16", "clip": 0.1},
        {"compile": "eager"},
        pytest.param({"compile": "aot_eager"}, marks=pytest.mark.slow),
    ],
)
def test_what_is_resumed_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    options = {**DEMANDING, **options}
    whole = train(tmp_path / "whole", **options)

    class Killed(BaseException):
        pass

    def failing_at(step: int) -> Any:
        def update(model: Any, window: Any, training: Any, *others: Any) -> Any:
            if training.progress.step == step:
                raise Killed
            return script_update(model, window, training, *others)

        return update

    script_update = script.update
    for step in (1, 14):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(script, "update", failing_at(step))
            torch.manual_seed(step)  # nothing of the process is to matter
            train(tmp_path / "parts", **options, resume=True)
    parts = train(tmp_path / "parts", **options, resume=True)
    check_same_weights(parts.module, whole.module)
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole")
    assert list(recorded(tmp_path / "whole")["loss"]) == list(range(22))
    assert parts.progress == whole.progress
    first, second = newest(tmp_path / "parts"), newest(tmp_path / "whole")
    for key in ("optimizer", "scaler", "random"):
        assert str(first[key]) == str(second[key])
    assert the_run(tmp_path / "parts").status == "finished"


KILLED = """
import io, os, signal, sys
import torch
sys.path.insert(0, {folder!r})
import train

place, last = sys.argv[1], int(sys.argv[2])
module = train if place == "update" else torch
function, calls = getattr(module, place), iter(range(1000))

def dying(*arguments):
    if next(calls) < last:
        return function(*arguments)
    if place == "save":
        state, file = arguments
        function(state, whole := io.BytesIO())
        file.write(whole.getvalue()[:1000])
        file.flush()
    os.kill(os.getpid(), signal.SIGKILL)

setattr(module, place, dying)
train.train(train.parse(sys.argv[3:]), train.Processes.join("cpu"))
"""


def command_line(chosen: Any) -> list[str]:
    found = []
    for field in fields(chosen):
        value, name = getattr(chosen, field.name), f"--{field.name.replace('_', '-')}"
        if value is True:
            found += [name]
        elif isinstance(value, tuple):
            found += [word for each in value for word in (name, each)]
        elif value is not False:
            found += [f"{name}={value}"]
    return found


@pytest.mark.parametrize(("place", "calls"), [("update", range(2, 22)), ("save", range(2, 8))])
def test_a_killed_process_leaves_what_can_be_resumed(
    tmp_path: Path, python: Python, place: str, calls: range
) -> None:
    options = {**DEMANDING, "deterministic": False}
    call = random.Random().choice(calls)
    code = KILLED.format(folder=str(SCRIPT.parent))
    arguments = command_line(settings(tmp_path / "parts", **options))
    python(code, place, str(call), *arguments, status=-signal.SIGKILL)
    assert the_run(tmp_path / "parts").status == "crashed"
    parts = train(tmp_path / "parts", **options, resume=True)
    whole = train(tmp_path / "whole", **options)
    check_same_weights(parts.module, whole.module)
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole"), call
    assert the_run(tmp_path / "parts").status == "finished"


def test_without_checkpoints_there_is_nothing_to_resume(tmp_path: Path) -> None:
    train(tmp_path, resume=True, steps=4)
    with pytest.raises(FileExistsError, match=r"step-0000004.pt exists: give --resume, or another"):
        train(tmp_path)
    longer = train(tmp_path, resume=True, steps=6)
    assert longer.progress.step == 6
    assert list(recorded(tmp_path)["loss"]) == list(range(6))
    assert train(tmp_path, resume=True, steps=6).progress.step == 6  # nothing is left to do


# tmm changes nothing


@pytest.mark.parametrize(
    "options",
    [{}, {"compile": "eager"}, {"compile": "aot_eager"}, {"precision": "float16", "accumulate": 2}],
)
def test_weights_are_the_same_without_tmm(tmp_path: Path, options: dict[str, Any]) -> None:
    options = {"deterministic": True, **options}
    monitored = train(tmp_path / "monitored", **options)
    plain = train(tmp_path / "plain", **options, monitor_every=0)
    check_same_weights(monitored.module, plain.module)
    assert not (tmp_path / "plain" / "runs").exists()
    states = newest(tmp_path / "monitored"), newest(tmp_path / "plain")
    assert all(str(states[0][key]) == str(states[1][key]) for key in ("scaler", "random"))
    assert "activation/blocks.0.mlp.1/rms" in recorded(tmp_path / "monitored")


NO_TMM = """
import sys
for name in ["tmm", *(name for name in sys.modules if name.startswith("tmm."))]:
    sys.modules[name] = None
"""


def test_checkpoints_and_the_script_go_on_without_tmm(tmp_path: Path, python: Python) -> None:
    options = {"steps": 9, "compile": "eager", "deterministic": True, "schedule": "constant"}
    train(tmp_path / "a", **{**options, "steps": 4})
    whole = train(tmp_path / "b", **options)
    source, bare = SCRIPT.read_text(), tmp_path / "bare.py"
    assert source.count("import tmm  # tmm\n") == 1
    bare.write_text(source.replace("import tmm  # tmm\n", ""))
    chosen = settings(tmp_path / "a", **options, resume=True, monitor_every=0)
    python(NO_TMM + RUN_FILE, str(bare), *command_line(chosen))
    state = newest(tmp_path / "a")
    check_same_weights(whole.module, state["model"])
    assert set(state["model"]) == set(script.build_model(chosen).state_dict())


# Losses


def single(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


LOSSES = {
    "single": (single, ["loss"]),
    "tuple": (
        lambda model, batch: (single(model, batch), 2 * single(model, batch)),
        ["loss", "loss/0", "loss/1"],
    ),
    "named": (
        lambda model, batch: {"a": single(model, batch), "b/c": 2 * single(model, batch)},
        ["loss", "loss/a", "loss/b/c"],
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_each_loss_is_recorded_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    function, names = LOSSES[kind]
    optimised: list[float] = []
    backward = Tensor.backward

    def noted(self: Tensor, *arguments: Any, **keywords: Any) -> None:
        optimised.append(self.item())
        backward(self, *arguments, **keywords)

    monkeypatch.setattr(script, "compute_losses", function)
    monkeypatch.setattr(Tensor, "backward", noted)
    train(tmp_path, accumulate=2, steps=4)
    found = recorded(tmp_path)
    assert [key for key in found if key.startswith("loss")] == names
    assert [key for key in found if key.startswith("val/")] == [f"val/{name}" for name in names]
    pairs = zip(optimised[::2], optimised[1::2], strict=True)
    assert list(found["loss"].values()) == pytest.approx([a + b for a, b in pairs], rel=1e-6)
    for step, total in found["loss"].items():
        parts = [found[name][step] for name in names[1:]] or [total]
        assert sum(parts) == pytest.approx(total, rel=1e-6)
    assert list(found["val/loss"]) == [3]


def test_validation_is_no_part_of_what_is_measured(tmp_path: Path) -> None:
    for often, folder in ((1, "often"), (100, "once")):
        train(tmp_path / folder, validate_every=often, steps=4)
    often, once = recorded(tmp_path / "often"), recorded(tmp_path / "once")
    assert list(often["val/loss"]) == [0, 1, 2, 3]
    assert list(once["val/loss"]) == [3]
    for found in (often, once):
        for key in [key for key in found if key.startswith("val/")]:
            found.pop(key)
    assert often == once
    assert "activation/head/rms" in often


def test_the_validation_loss_is_the_mean_over_its_items(tmp_path: Path) -> None:
    chosen = settings(tmp_path, batch_size=5, dropout=0.5)
    data = script.Subset(script.build_data(chosen)[1], range(13))
    torch.manual_seed(0)
    model = script.build_model(chosen)
    found = script.validate(model, data, chosen, ONE)
    assert model.training
    tokens, targets = map(torch.stack, zip(*data, strict=True))
    expected = script.named(script.compute_losses(model.eval(), (tokens, targets)))
    assert found.keys() == {f"val/{key}" for key in expected}
    for key, loss in expected.items():
        assert found[f"val/{key}"].item() == pytest.approx(loss.item(), rel=1e-6)


# Learning rates


SCHEDULERS = {
    "constant": lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1.0),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 90),
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, 30, 0.3),
    "exponential": lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.3 ** (1 / 30)),
}


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")
@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedules_are_those_of_torch_after_the_warmup(tmp_path: Path, schedule: str) -> None:
    chosen = settings(tmp_path, schedule=schedule, steps=100, warmup=10, decay_every=30)
    rates = [script.learning_rate(chosen, step) for step in range(100)]
    assert rates[:10] == pytest.approx([3e-3 * (step + 1) / 10 for step in range(10)])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = SCHEDULERS[schedule](optimizer)
    for rate in rates[10:]:
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9, abs=1e-15)
        scheduler.step()
    no_warmup = replace(chosen, warmup=0)
    assert script.learning_rate(no_warmup, 0) == 3e-3


def test_the_plateau_is_that_of_torch(tmp_path: Path) -> None:
    chosen = settings(tmp_path, schedule="plateau", warmup=0, plateau_patience=2)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-3)
    scheduler = lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=chosen.decay, patience=2, threshold=0.0, eps=0.0
    )
    progress = script.Progress()
    generator = random.Random(0)
    losses = [5.0, 4.0, 4.0, math.nan, *(generator.random() * 4 for _ in range(60))]
    for loss in losses:
        progress.judge(loss, chosen)
        scheduler.step(loss)
        rate = script.learning_rate(chosen, 5, progress.plateau_scale)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"])
    assert progress.best == min(loss for loss in losses if not math.isnan(loss))


def test_the_optimizer_gets_the_learning_rates(tmp_path: Path, monkeypatch: Any) -> None:
    given = []
    step = torch.optim.AdamW.step

    def noted(self: torch.optim.AdamW) -> None:
        given.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    train(tmp_path, schedule="cosine")
    expected = [script.learning_rate(settings(tmp_path), step) for step in range(10)]
    assert given == expected == list(recorded(tmp_path)["learning_rate"].values())


# Steps


def test_every_item_comes_once_in_an_epoch_and_windows_are_whole(tmp_path: Path) -> None:
    chosen = settings(tmp_path, batch_size=4, accumulate=3)
    data = script.TensorDataset(torch.arange(30))  # 8 batches, the last of 2; 3 steps an epoch
    three_epochs = list(islice(script.windows(data, chosen, ONE, 0), 9))
    assert [len(window) for window in three_epochs] == [3, 3, 2] * 3
    for window in three_epochs:
        assert sum(weight for _, weight in window) == pytest.approx(1)
        items = sum(len(batch) for (batch,), _ in window)
        assert [len(batch) / items for (batch,), _ in window] == [weight for _, weight in window]
    epochs = [
        torch.cat([batch for window in three_epochs[start : start + 3] for (batch,), _ in window])
        for start in (0, 3, 6)
    ]
    for epoch in epochs:
        assert epoch.sort().values.tolist() == list(range(30))
    assert not torch.equal(epochs[0], epochs[1])
    for step in range(9):
        later = list(islice(script.windows(data, chosen, ONE, step), 9 - step))
        assert str(later) == str(three_epochs[step:])
    loaded_by_others = script.windows(data, replace(chosen, workers=1), ONE, 1)
    assert str(next(loaded_by_others)) == str(three_epochs[1])


def test_processes_share_each_batch(tmp_path: Path) -> None:
    chosen = settings(tmp_path, batch_size=8, accumulate=2)
    data = script.TensorDataset(torch.arange(29))  # 28 are used
    both = [
        list(islice(script.windows(data, chosen, script.Processes(rank, 2, ONE.device), 0), 2))
        for rank in (0, 1)
    ]
    for windows in zip(*both, strict=True):
        for (first, weight), (second, other) in zip(*windows, strict=True):
            assert len(first[0]) == len(second[0])
            assert weight == other
    found = [batch for windows in both for window in windows for (batch,), _ in window]
    assert len(set(torch.cat(found).tolist())) == len(torch.cat(found)) == 28


def test_micro_batches_join_to_the_gradient_of_one_large_batch(tmp_path: Path) -> None:
    gradients = []
    for batch_size, accumulate in ((10, 1), (4, 3)):  # 4 + 4 + 2
        chosen = settings(tmp_path, batch_size=batch_size, accumulate=accumulate, dropout=0.0)
        data = script.Subset(script.build_data(chosen)[0], range(10))
        torch.manual_seed(0)
        model = script.build_model(chosen)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        chosen = replace(chosen, clip=math.inf)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        training = script.Training(model, optimizer, scaler, script.Progress())
        window = next(script.windows(data, chosen, ONE, 0))
        values = script.update(model, window, training, chosen, ONE)
        gradients.append({name: before[name] - p for name, p in model.named_parameters()})
        squares = sum(g.double().square().sum() for g in gradients[-1].values())
        assert values["gradient_norm"].item() == pytest.approx(squares.sqrt().item(), rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    train(tmp_path, clip=0.01, steps=3)
    found = recorded(tmp_path)
    names = [key for key in found if key.startswith("gradient/") and key.endswith("/norm")]
    for step, norm in found["gradient_norm"].items():
        total = math.sqrt(sum(found[name][step] ** 2 for name in names))
        assert norm > 0.1
        assert total == pytest.approx(0.01, rel=1e-3)


def test_steps_that_the_scaler_skips_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, calls = script.compute_losses, iter(range(1000))
    weights: list[Tensor] = []

    def overflowing(model: nn.Module, batch: Any) -> Any:
        if torch.is_grad_enabled():
            weights.append(next(model.parameters()).detach().clone())
            if next(calls) == 2:
                return compute(model, batch)["next_byte"] * math.inf
        return compute(model, batch)["next_byte"]

    monkeypatch.setattr(script, "compute_losses", overflowing)
    train(tmp_path, precision="float16", steps=5, validate_every=100)
    found = recorded(tmp_path)
    assert list(found["step/skipped"].values()) == [0, 0, 1, 0, 0]
    scale = list(found["step/grad_scale"].values())
    assert [after / scale[0] for after in scale] in ([1, 1, 1, 0.5, 0.5], [1, 1, 0.5, 0.5, 0.5])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[3], weights[4])
    assert found["gradient/head.bias/norm"].keys() == {0, 1, 3, 4}


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_trains_alike(tmp_path: Path, precision: str) -> None:
    losses = []
    for each in ("float32", precision):
        train(tmp_path / each, precision=each, dropout=0.0)
        losses.append(list(recorded(tmp_path / each)["loss"].values()))
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


# Validation decides


def falling_until(best: int) -> Any:
    """Validations whose loss is least at one of them."""
    calls = iter(range(1000))
    return lambda *_: {"val/loss": torch.tensor(1.0 + abs(next(calls) - best))}


def test_early_stopping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "validate", falling_until(2))
    training = train(tmp_path, validate_every=2, patience=3, steps=100)
    assert training.progress.step == 12  # validations after 2, 4, 6 (the best), 8, 10, 12
    record = the_run(tmp_path)
    assert (record.status, record.reason) == ("stopped", "3 validations without improvement")
    assert (record.steps, record.last_step) == (12, 11)
    best = torch.load(tmp_path / "checkpoints" / "best.pt", weights_only=True)
    assert best["progress"]["step"] == 6
    assert best["progress"]["best"] == 1.0


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    train(tmp_path, keep=3, save_every=2, steps=11)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["best.pt", *(f"step-00000{step:02}.pt" for step in (8, 10, 11))]
    assert newest(tmp_path)["progress"]["step"] == 11


# Other options


def test_one_batch_runs_everything_and_touches_nothing_else(tmp_path: Path) -> None:
    for _ in range(2):
        train(tmp_path, fast=True, accumulate=4, steps=100)
    assert [path.name for path in tmp_path.iterdir()] == ["fast"]
    for record in list_runs(tmp_path / "fast" / "runs"):
        assert (record.status, record.steps) == ("finished", 1)
        with tmm.open_run(record.path) as run:
            assert {"loss", "val/loss", "update/head.weight/relative_norm"} <= set(run.keys(None))
            assert tmm.analysis.find_anomalies(run) == ()


def test_debugging_uses_a_part_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    load = script.load

    def noted(data: Any, *others: Any) -> Any:
        sizes.append(len(data))
        return load(data, *others)

    monkeypatch.setattr(script, "load", noted)
    train(tmp_path, debug=True)
    assert set(sizes) == {32}


def test_a_profile_is_written(tmp_path: Path) -> None:
    train(tmp_path, profile=True, steps=6)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    steps = {event["name"] for event in events if event["name"].startswith("ProfilerStep#")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3", "ProfilerStep#4"}


def test_sinks_get_the_values(tmp_path: Path) -> None:
    train(tmp_path, sink=("jsonl", "tensorboard"), steps=3)
    path = the_run(tmp_path).path
    lines = [json.loads(line) for line in (path / "values.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["values"]["loss"] for line in lines}
    assert losses == recorded(tmp_path)["loss"]
    assert list((path / "tensorboard").glob("events.*"))


def test_an_error_ends_in_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise MemoryError("too large")

    monkeypatch.setattr(script, "validate", broken)
    with pytest.raises(MemoryError):
        train(tmp_path)
    record = the_run(tmp_path)
    assert (record.status, record.reason) == ("failed", "MemoryError: too large")
    assert list(recorded(tmp_path)["loss"]) == [0, 1, 2]


def test_the_command_line_gives_the_settings(tmp_path: Path) -> None:
    assert script.parse([]) == script.Settings()
    chosen = settings(tmp_path, sink=("wandb", "csv"), clip=math.inf, schedule="step", profile=True)
    assert script.parse(command_line(chosen)) == chosen
    with pytest.raises(SystemExit):
        script.parse(["--schedule", "linear"])


def test_tmm_is_in_few_lines() -> None:
    lines = SCRIPT.read_text().splitlines()
    marked = [line for line in lines if line.endswith("# tmm")]
    calls = [line for line in lines if re.search(r"\b(tmm|run)\.[a-z_]+\(|no_monitor", line)]
    assert len(marked) == 7
    assert {line for line in calls if "default_spec" not in line} == {*marked} - {
        "import tmm  # tmm"
    }


# Several processes


Distributed = Callable[[Any], None]


@pytest.fixture
def as_under_torchrun(python: Python) -> Distributed:
    """Runs the script in two processes."""
    return lambda chosen: python(RUN_FILE, str(SCRIPT), *command_line(chosen), ranks=2)


def torchrun(chosen: Any) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run(
        [sys.executable, *launcher, str(SCRIPT), *command_line(chosen)],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    check_two_processes(tmp_path, torchrun, "")


@pytest.mark.parametrize("backend", ["", pytest.param("eager", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(
    tmp_path: Path, as_under_torchrun: Distributed, backend: str
) -> None:
    check_two_processes(tmp_path, as_under_torchrun, backend)


def check_two_processes(tmp_path: Path, run: Distributed, backend: str) -> None:
    options = {"dropout": 0.0, "accumulate": 3, "compile": backend, "steps": 8}
    one = train(tmp_path / "one", **options)
    run(settings(tmp_path / "two", **options))
    weights, expected_weights = newest(tmp_path / "two")["model"], one.module.state_dict()
    for name in [name for name in weights if name.endswith("qkv.bias")]:
        # Gradients of the biases of keys are zero but for rounding, which Adam scales up.
        weights[name][16:32] = expected_weights[name][16:32]
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5)
    found, expected = recorded(tmp_path / "two"), recorded(tmp_path / "one")
    for key in expected:
        # Adam, as above; and some rows of each call, which are others.
        if not key.startswith(("update/", "parameter/")) and not key.endswith("/spread"):
            assert list(found[key]) == list(expected[key])
            values = list(expected[key].values())
            assert list(found[key].values()) == pytest.approx(values, rel=2e-3, abs=1e-4), key
    assert the_run(tmp_path / "two").status == "finished"


@pytest.mark.slow
def test_two_processes_are_resumed(tmp_path: Path, as_under_torchrun: Distributed) -> None:
    options = {"deterministic": True, "accumulate": 3, "validate_every": 2}
    as_under_torchrun(settings(tmp_path / "parts", **options, steps=6, schedule="constant"))
    as_under_torchrun(settings(tmp_path / "parts", **options, resume=True, schedule="constant"))
    as_under_torchrun(settings(tmp_path / "whole", **options, schedule="constant"))
    first, second = newest(tmp_path / "parts"), newest(tmp_path / "whole")
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    assert str(first["random"]) == str(second["random"])
    assert not torch.equal(first["random"][0]["torch"], first["random"][1]["torch"])
    assert recorded(tmp_path / "parts") == recorded(tmp_path / "whole")


@pytest.mark.slow
def test_inductor_trains_and_resumes(tmp_path: Path) -> None:
    options = {"compile": "inductor", "deterministic": True, "schedule": "constant"}
    whole = train(tmp_path / "whole", **options, steps=8)
    train(tmp_path / "parts", **options, steps=6)
    parts = train(tmp_path / "parts", **options, steps=8, resume=True)
    check_same_weights(parts.module, whole.module)
    assert recorded(tmp_path / "parts")["loss"] == recorded(tmp_path / "whole")["loss"]
