"""The commands that list, show, compare, plot and delete runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from torch import nn
from typer.testing import CliRunner

import tmm
from tests.browser import find_browser
from tmm.cli import app
from tmm.cli.sparkline import sparkline
from tmm.kernels.kernel_registry import OPERATIONS

Command = Callable[..., Result]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def tmm_command(root: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    monkeypatch.setenv("TMM_ROOT", str(root))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, status: int = 0, answer: str | None = None) -> Result:
        result = CliRunner().invoke(app, list(arguments), input=answer)
        assert result.exit_code == status, result.output
        return result

    return run


def record(root: Path, name: str, losses: list[float], **options: Any) -> tmm.LiveRun:
    with tmm.start_run("p", name, root=root, system_seconds=None, **options) as run:
        for loss in losses:
            run.log({"loss": loss, "accuracy": 1 - loss, "a/b,c": 2 * loss})
            run.step()
    return run


FALLING = [1.0, 0.5, 0.25, 0.2]


def test_list(tmm_command: Command, root: Path) -> None:
    tmm_command("runs", "list", status=1)  # no folder yet
    first = record(root, "first", FALLING, tags=["good"])
    second = record(root, "second", FALLING)
    (second.path / "run.json").write_text("{")
    for command in (("runs", "list"), ("list",)):
        found = json.loads(tmm_command(*command, "--json").stdout)
        assert {run["id"]: run["status"] for run in found} == {
            first.id: "finished",
            second.id: "broken",
        }
    text = tmm_command("list").stdout
    assert first.id in text
    assert "broken" in text
    (only,) = json.loads(tmm_command("list", "--tag", "good", "--json").stdout)
    assert (only["steps"], only["last_step"], only["tags"]) == (4, 3, ["good"])
    assert json.loads(tmm_command("list", "--project", "none", "--json").stdout) == []
    assert "none" in tmm_command("list", "--status", "failed").stdout
    assert "is none of running, finished" in tmm_command("list", "--status", "x", status=1).output


def test_show(tmm_command: Command, root: Path) -> None:
    run = record(root, "first", [*FALLING, float("nan")], config={"lr": 0.1}, notes="a [note]")
    for command in (("runs", "show"), ("show",)):
        shown = json.loads(tmm_command(*command, "first", "--json").stdout)
        assert (shown["id"], shown["config"], shown["steps"]) == (run.id, {"lr": 0.1}, 5)
        (loss,) = [key for key in shown["keys"] if key["key"] == "loss"]
        assert (loss["count"], loss["first"], loss["minimum"], loss["nonfinite"]) == (5, 1, 0.2, 1)
        assert loss["last"] == 0.2  # of those that are finite
    text = tmm_command("show", run.id[:-2], "-m", "loss").stdout
    assert "a [note]" in text
    assert "loss" in text
    assert "accuracy" not in text
    assert "no key matches 'x'" in tmm_command("show", "first", "-k", "x", status=1).output
    assert "not a regular expression" in tmm_command("show", "first", "-k", "(", status=1).output
    assert "no run 'frist'" in tmm_command("show", "frist", status=1).output
    (run.path / "state.json").write_text("[")
    assert "is broken" in tmm_command("show", run.id, status=1).output


def test_compare(tmm_command: Command, root: Path) -> None:
    record(root, "first", FALLING, config={"lr": 0.1, "same": 1})
    record(root, "second", [1.0, 0.5, 0.3, 0.1], config={"lr": 0.2, "same": 1})
    for command in (("runs", "compare"), ("compare",)):
        found = json.loads(tmm_command(*command, "first", "second", "--json").stdout)
        assert found["first_divergence"]["step"] == 2
        assert "same" not in json.dumps(found["config"])
    text = tmm_command("compare", "first", "second").stdout
    assert "part at step 2" in text
    assert "lr" in text
    assert "needs two runs" in tmm_command("compare", "first", status=1).output
    assert "no run 'x'" in tmm_command("compare", "first", "x", status=1).output


def test_delete_and_prune(tmm_command: Command, root: Path) -> None:
    first, second = (record(root, name, FALLING) for name in ("first", "second"))
    tmm_command("delete", "first", answer="n\n", status=1)
    assert first.path.exists()
    tmm_command("runs", "delete", "first", answer="y\n")
    assert not first.path.exists()
    assert "no run 'first'" in tmm_command("delete", "first", "--yes", status=1).output
    tmm_command("runs", "prune", "--older-than", "1d", "--yes")
    assert second.path.exists()
    tmm_command("runs", "prune", "--older-than", "0m", answer="n\n", status=1)
    assert second.path.exists()
    deleted = tmm_command("runs", "prune", "--older-than", "0m", "--yes", "--json").stdout
    assert json.loads(deleted) == [second.id]
    assert "write a number" in tmm_command("runs", "prune", "--older-than", "x", status=1).output


def test_export(tmm_command: Command, root: Path, tmp_path: Path) -> None:
    record(root, "first", FALLING)
    for suffix in ("csv", "jsonl", "h5"):
        path = tmp_path / f"out.{suffix}"
        assert "wrote" in tmm_command("runs", "export", "first", str(path), "-k", "a").stdout
        assert path.stat().st_size > 0
    loaded = tmm.StorageManager.load_hdf5(tmp_path / "out.h5")
    assert loaded["a/b,c"] == {step: 2 * loss for step, loss in enumerate(FALLING)}
    missing = tmm_command("runs", "export", "first", str(tmp_path / "x.zip"), status=1)
    assert "csv" in missing.output
    tmm_command("runs", "export", "none", str(tmp_path / "x.csv"), status=1)


def test_anomalies(tmm_command: Command, root: Path) -> None:
    record(root, "healthy", FALLING)
    assert json.loads(tmm_command("anomalies", "healthy", "--json").stdout) == []
    record(root, "broken", [*FALLING, float("nan")])
    first = tmm_command("anomalies", "broken", "--json").stdout
    assert first == tmm_command("anomalies", "broken", "--auto", "--json").stdout
    (worst, *_) = json.loads(first)
    assert (worst["severity"], worst["key"], worst["step"]) == ("critical", "loss", 4)
    assert worst["value"] == "NaN"
    assert "loss" in tmm_command("anomalies", "broken", "-t", worst["kind"]).stdout
    assert "no anomaly of type" in tmm_command("anomalies", "broken", "-t", "x", status=1).output
    tmm_command("anomalies", "broken", "--severity", "x", status=1)
    tmm_command("anomalies", "none", status=1)


def test_plot(tmm_command: Command, root: Path, tmp_path: Path) -> None:
    record(root, "first", FALLING)
    text = tmm_command("plot", "first").stdout
    assert "loss" in text
    assert "█" in text
    found = json.loads(tmm_command("plot", "first", "accuracy", "--json").stdout)
    assert found["accuracy"]["steps"] == [0, 1, 2, 3]
    tmm_command("plot", "first", "-o", str(tmp_path / "out.html"), "--log")
    assert (tmp_path / "out.html").stat().st_size > 1000
    assert "no key matches 'x'" in tmm_command("plot", "first", "x", status=1).output
    assert "write a .html" in tmm_command("plot", "first", "-o", "out.txt", status=1).output


def test_plot_as_a_picture(tmm_command: Command, root: Path, tmp_path: Path) -> None:
    find_browser()
    record(root, "first", FALLING)
    tmm_command("plot", "first", "-o", str(tmp_path / "out.svg"), "--log")
    assert (tmp_path / "out.svg").stat().st_size > 1000


def test_sparkline() -> None:
    values = torch.arange(16.0).double().numpy()
    assert sparkline(values, 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(values * 0 + 3, 4) == "▅▅▅▅"
    assert sparkline(values * float("nan"), 4) == "!!!!"
    assert sparkline(values[:0], 4) == ""
    assert "!" in sparkline(values - 5, 8, log=True)


def test_explain_and_info(tmm_command: Command, root: Path) -> None:
    assert json.loads(tmm_command("info", "--json").stdout)["runs"] == 0
    record(root, "plain", FALLING)
    assert "watched no model" in tmm_command("explain", "plain", status=1).output
    with tmm.start_run("p", "watched", root=root, system_seconds=None) as run:
        model = run.watch(nn.Linear(2, 2), tmm.Spec(tmm.activation("rms")))
        model(torch.randn(1, 2))
        run.step()
    assert "tmm.activation('rms')" in tmm_command("explain", "watched").stdout
    assert json.loads(tmm_command("explain", "watched", "--json").stdout)["id"] == run.id
    assert json.loads(tmm_command("info", "--json").stdout)["runs"] == 2
    assert "torch" in tmm_command("info").stdout
    of_cpu = json.loads(tmm_command("info", "--json").stdout)["kernels"]["cpu"]
    assert of_cpu.keys() == set(OPERATIONS)
    assert "compiled when first used" not in of_cpu["summarize"]  # as a model was watched above
    assert "kernels, cpu" in tmm_command("info").stdout


def test_odd_texts_are_shown_as_they_are(tmm_command: Command, root: Path) -> None:
    odd = "[/t] [red]x\\[/red] \n \u00fc"
    for name in (odd, "other"):
        record(root, name, FALLING, tags=[odd], notes=odd, config={"a": {"b": [odd]}, "n": name})
    for command in (("list",), ("show", odd), ("compare", odd, "other"), ("anomalies", odd)):
        tmm_command(*command)
        json.loads(tmm_command(*command, "--json").stdout)
    assert "the same run" in tmm_command("compare", odd, odd, status=1).output
    tmm_command("plot", odd, "--width", "0", status=2)
    tmm_command("list", "--limit", "0", status=2)
    tmm_command("runs", "prune", "--older-than", "99999999999d", status=1)


DEEP = "gradient/base_model.model.model.layers.10.self_attn.q_proj.lora_A.default.weight/norm"


@pytest.mark.parametrize("width", [50, 80, 100])
@pytest.mark.parametrize("key", ["loss", DEEP.replace("gradient/", "own/"), "x" * 300])
def test_numbers_are_shown_beside_keys_of_any_length(
    tmm_command: Command, root: Path, monkeypatch: pytest.MonkeyPatch, key: str, width: int
) -> None:
    paths = []
    for factor in (1, 2):
        with tmm.start_run("p", root=root, system_seconds=None) as run:
            for step in range(4):
                run.log({key: 1234567.0 * factor + step, "accuracy": 0.5})
                run.step()
        paths.append(str(run.path))
    monkeypatch.setenv("COLUMNS", str(width))
    for command in (["show", paths[0]], ["compare", *paths], ["plot", paths[0], "."]):
        shown = tmm_command(*command).stdout
        table = shown[shown.rindex("─" * 5) :]
        unbroken = "".join(table.split())
        assert "0.5" in unbroken
        if width >= 100:
            assert "1.23457e+06" in table
        assert len(table.splitlines()) < 200


def test_ids_in_a_list_are_not_broken(
    tmm_command: Command, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [record(root, name, FALLING, tags=["tag" * 9]) for name in ("short", "long " * 30)]
    for width in (80, 100, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        shown = tmm_command("list").stdout
        assert all(run.id in shown for run in runs)
