from __future__ import annotations

import json
import re
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import CppCompileError, InductorError
from torch._inductor.utils import fresh_cache
from typer.testing import CliRunner

import tmm
from tmm.cli import app
from tmm.cli.demo_training import TrainingSettings
from tmm.examples.gpt import GPT, GPTConfig

STEPS, EVERY = 8, 3


def demo(run: Path, *options: str) -> str:
    arguments = ["demo", "--run", str(run), "--steps", str(STEPS), "--every", str(EVERY)]
    result = CliRunner().invoke(app, [*arguments, *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("demo") / "run"
    return run, demo(run, "--backend", "eager")


def measured_modules() -> list[str]:
    model = GPT(TrainingSettings(Path()).model)
    names = [name or "[root module]" for name, _ in model.named_modules()]
    return [name for name in names if "drop" not in name and name != "h"]


def test_demo_shows_its_progress(demo_run: tuple[Path, str]) -> None:
    _, output = demo_run
    losses = [float(loss) for loss in re.findall(r"^step .* loss ([\d.]+), \d+ ms", output, re.M)]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.5


def test_demo_prints_a_table_of_the_last_monitored_step(demo_run: tuple[Path, str]) -> None:
    run_path, output = demo_run
    assert "at step 6" in output
    assert max(map(len, output.split("The run lies")[0].splitlines())) <= 80
    rows = [line.strip("│").split("│") for line in output.splitlines() if line.startswith("│")]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert sorted(cells) == sorted(measured_modules())
    (head,) = (line for line in output.splitlines() if line.startswith("┃"))
    metrics = [name.strip() for name in head.strip("┃").split("┃")][1:]
    assert sorted(metrics) == ["absmax", "kurtosis", "l2", "rms", "zero_fraction"]
    with tmm.open_run(run_path) as run:
        values = run.at(6)
    for module, row in cells.items():
        for metric, cell in zip(metrics, row, strict=True):
            value = values.get(f"activation/{module}/{metric}")
            assert cell == ("" if value is None else f"{value:.4g}")


def test_demo_leaves_a_run_that_opens(demo_run: tuple[Path, str]) -> None:
    path, output = demo_run
    assert str(path) in output
    with tmm.open_run(path) as run:
        assert run.steps.tolist() == [0, 3, 6]
        metrics = ("rms", "absmax", "kurtosis", "zero_fraction")
        expected = {
            f"activation/{name}/{metric}" for name in measured_modules() for metric in metrics
        }
        norms = {
            f"activation/h.{layer}.{part}/l2" for layer in range(3) for part in ("attn", "mlp")
        }
        assert set(run.keys()) == expected | norms | {"loss"}
        _, losses = run.series("loss")
        assert losses[-1] < losses[0] - 0.5
        assert run.events == []


def test_the_lines_that_open_the_run_work(demo_run: tuple[Path, str]) -> None:
    _, output = demo_run
    lines = output.split("Open it in Python:")[1].splitlines()
    names: dict[str, object] = {}
    exec("\n".join(line.strip() for line in lines), names)
    steps, run = names["steps"], names["run"]
    assert isinstance(run, tmm.Run)
    assert list(run.steps) == list(steps)  # type: ignore[call-overload]
    run.close()


@pytest.fixture
def small_gpt(monkeypatch: pytest.MonkeyPatch) -> None:
    small = GPTConfig(256, context=128, layers=1, heads=1, width=8)
    monkeypatch.setattr("tmm.cli.demo_training.GPTConfig", lambda *sizes, **options: small)


@pytest.mark.usefixtures("small_gpt")
def test_demo_never_mixes_two_runs(tmp_path: Path) -> None:
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    output = demo(tmp_path / "run", "--backend", "eager", "--every", "1", "--steps", "1")
    assert str(tmp_path / "run-3") in output
    assert tmm.open_run(tmp_path / "run-3").steps.tolist() == [0]
    assert not any(any((tmp_path / name).iterdir()) for name in ("run", "run-2"))


@pytest.mark.usefixtures("small_gpt")
def test_demo_without_a_compiler_names_a_backend_that_needs_none(tmp_path: Path) -> None:
    cpp_builder.cpp_compiler_search.cache_clear()
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")}):
        arguments = ["demo", "--run", str(tmp_path / "run"), "--steps", "1"]
        result = CliRunner().invoke(app, [*arguments, "--backend", "inductor"])
    assert result.exit_code == 1
    assert "found none" in result.stderr
    assert "tmm demo --backend aot_eager" in result.stderr


@pytest.mark.usefixtures("small_gpt")
def test_demo_without_a_compiler_runs_as_it_was_traced(tmp_path: Path) -> None:
    cpp_builder.cpp_compiler_search.cache_clear()
    run = tmp_path / "run"
    with fresh_cache(), torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent")}):
        output = demo(run, "--steps", "1", "--every", "1")
    assert "There is no C++ compiler" in " ".join(output.split())
    assert "aot_eager" in output
    assert tmm.open_run(run).steps.tolist() == [0]


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        (CppCompileError(["g++"], "Python.h: No such file"), "Python.h"),
        (ZeroDivisionError("else"), None),
    ],
)
def test_demo_explains_only_what_a_compiler_did(
    cause: Exception, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> float:
        raise InductorError(cause, sys._getframe())

    monkeypatch.setattr("tmm.cli.demo_training.train", fail)
    result = CliRunner().invoke(app, ["demo", "--run", str(tmp_path / "run")])
    assert result.exit_code == 1
    if expected is None:
        assert isinstance(result.exception, InductorError)
    else:
        assert expected in result.stderr
        assert "--backend aot_eager" in result.stderr


def test_an_unknown_backend_is_refused() -> None:
    result = CliRunner().invoke(app, ["demo", "--backend", "inductr"])
    assert result.exit_code == 2
    assert "inductr" in result.stderr
    assert "aot_eager" in result.stderr


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"tmm {version('tmm-compile')}\n")


def test_tmm_runs_as_a_module(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["tmm", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("tmm", run_name="__main__")
    assert "demo" in capsys.readouterr().out


@pytest.mark.usefixtures("small_gpt")
def test_demo_as_json(tmp_path: Path) -> None:
    options = ["--steps", "2", "--every", "1", "--backend", "eager", "--json"]
    result = CliRunner().invoke(app, ["demo", "--run", str(tmp_path / "run"), *options])
    found = json.loads(result.stdout)
    assert found["step"] == 1
    assert found["loss"]["first"] > 1
    assert found["values"]["activation/h.0.mlp/rms"] > 0
    assert "Outputs of the layers" in result.stderr


def test_demo_names_a_device_that_is_not_there(tmp_path: Path) -> None:
    for device in ("nope", "cuda:99"):
        options = ["--run", str(tmp_path / "run"), "--device", device, "--backend", "eager"]
        result = CliRunner().invoke(app, ["demo", *options])
        assert result.exit_code == 2
        assert device in result.output
    assert not (tmp_path / "run").exists()
