"""The report of a device: parts, limits of time, crashes; run on a CPU with small sizes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.on_gpu import costs, parts, process, truth
from benchmarks.on_gpu.findings import (
    Finding,
    PartReport,
    append,
    read_findings,
    write_report,
)
from benchmarks.on_gpu.parts import PARTS, Part
from benchmarks.on_gpu.subjects import Subject, zoo
from tmm.core.metrics import COLUMN_SEPARATOR
from tmm.kernels.ops import summarize

TOY = Subject("cpu", toy=True)


def part(name: str, least: float = 10.0, most: float = 100.0) -> Part:
    return Part(name, f"does {name}", lambda subject, folder: iter(()), least, most)


class Clock:
    """Time that goes by only when a part runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("minutes", "begun", "given"),
    [
        (10.0, ["a", "b", "c"], [100.0, 100.0, 100.0]),
        (2.0, ["a", "b"], [100.0, 30.0]),  # 30 s are left for the second, none for the third
        (0.1, [], []),
    ],
)
def test_a_limit_of_time_cuts_off_the_last_parts(
    minutes: float, begun: list[str], given: list[float]
) -> None:
    clock, limits, written = Clock(), [], []

    def run(one: Part, seconds: float) -> PartReport:
        limits.append(seconds)
        clock.now += 90.0 if one.name == "a" else seconds
        return PartReport(one.name, one.does, (Finding("x", "y"),), seconds)

    names = ["a", "b", "c"]
    reports = gpu.run_all(
        [part(name) for name in names],
        minutes,
        run,
        lambda found: written.append(len(found)),
        clock,
    )
    assert [report.name for report in reports] == names
    assert [report.name for report in reports if report.findings] == begun
    assert limits == given
    assert written == [1, 2, 3]  # the report is there after each part
    assert all(report.is_good for report in reports)  # to have no time is no fault
    assert all("not begun" in report.ended_by for report in reports if not report.findings)


def test_truth_comes_before_cost() -> None:
    names = [one.name for one in PARTS]
    assert names == ["machine", "kernels", "models", "costs", "CUDA graphs", "trace"]
    assert sum(one.least for one in PARTS) < 8 * 60


def crashing(subject: Subject, folder: Path) -> Iterator[Finding]:
    yield Finding("first", "found", is_good=True)
    raise RuntimeError("an illegal memory access was encountered")


def sleeping(subject: Subject, folder: Path) -> Iterator[Finding]:
    yield Finding("first", "found", is_good=True)
    time.sleep(600)


def test_what_was_found_before_a_crash_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: what a part yields is in the file at once."""
    monkeypatch.setattr(parts, "PARTS", (Part("crashes", "", crashing),))
    file = tmp_path / "crashes.jsonl"
    with pytest.raises(RuntimeError, match="illegal"):
        process.main(["crashes", "cpu", str(file), "5", "toy"])
    assert read_findings(file) == (Finding("first", "found", is_good=True),)
    with file.open("a") as opened:
        opened.write('{"what": "cut o')
    assert len(read_findings(file)) == 1


@pytest.mark.parametrize(
    ("name", "seconds", "ended", "is_good"),
    [
        ("nothing of that name", 60.0, "exit status 1: ValueError", False),
        ("machine", 0.2, "its time was over", True),
    ],
)
def test_a_part_that_fails_or_hangs_ends_alone(
    name: str, seconds: float, ended: str, is_good: bool, tmp_path: Path
) -> None:
    started = time.monotonic()
    report = gpu.run_part(part(name), "cpu", tmp_path, tmp_path, seconds, toy=True)
    assert ended in report.ended_by
    assert report.is_good == is_good
    assert report.findings == ()
    assert time.monotonic() - started < 60


def test_a_part_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    report = gpu.run_part(PARTS[0], "cpu", tmp_path, tmp_path, 120.0, toy=True)
    assert report.is_good
    assert not report.ended_by
    found = {one.what: one.text for one in report.findings}
    assert found["torch"].startswith(torch.__version__)
    assert "kernel of summarize" in found
    assert list(tmp_path.glob("*.jsonl")) == []  # it is in the report now


def test_the_report_says_what_is_bad_and_what_ended_early(tmp_path: Path) -> None:
    reports = [
        PartReport("good", "does", (Finding("x", "a | b\nc", True, {"n": 1}),), 1.0),
        PartReport("bad", "does", (Finding("y", "wrong", False), Finding("z", "told")), 2.0),
        PartReport("broken", "does", (), 3.0, "exit status 1: no"),
        PartReport("cut", "does", (), 0.0, "not begun: 0 s were left", is_cut=True),
    ]
    path = write_report(tmp_path, "tmm on a device", reports, {"torch": "2"})
    text = path.read_text()
    assert "## good: good, 1 s" in text
    assert "| x | a \\| b<br>c | good |" in text
    assert "## bad: NOT GOOD" in text
    assert "| y | wrong | **BAD** |" in text
    assert "**Ended early**: exit status 1: no" in text
    assert [report.is_good for report in reports] == [True, False, False, True]
    kept = json.loads((tmp_path / "report.json").read_text())
    assert [one["is_good"] for one in kept["parts"]] == [True, False, False, True]
    assert kept["parts"][0]["findings"][0]["numbers"] == {"n": 1}


def test_findings_survive_a_file(tmp_path: Path) -> None:
    findings = Finding("a", "b", None, {"c": 1.5}), Finding("d", "e\nf", is_good=False)
    for one in findings:
        append(tmp_path / "x.jsonl", one)
    assert read_findings(tmp_path / "x.jsonl") == findings
    assert read_findings(tmp_path / "none.jsonl") == ()


def test_kernels_agree_with_their_definitions() -> None:
    found = list(truth.kernels(TOY))
    assert len(found) == 11
    assert all(one.is_good for one in found), found


@pytest.mark.parametrize("column", ["sum_squares", "nans", "moment4", "maximum"])
def test_a_wrong_row_is_found(column: str) -> None:
    tensors = truth.samples(torch.float32, toy=True)
    columns = truth._ALL.columns
    rows = [summarize(x, COLUMN_SEPARATOR.join(columns)).clone() for x in tensors]
    assert "agree" in truth.compared(tensors, rows)
    rows[2][columns.index(column)] += 0.01 * (1 + rows[2][columns.index(column)].abs())
    with pytest.raises(AssertionError, match=r"\(256,\)"):
        truth.compared(tensors, rows)


def test_a_wrong_statistic_of_an_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = truth.summarize_attention
    assert "allowed" in truth.attention(TOY, torch.float32)

    def wrong(query: torch.Tensor, *rest: object, **named: object) -> torch.Tensor:
        rows = measure(query, *rest, **named)  # type: ignore[arg-type]
        return rows if query.dtype == torch.float64 else rows * 1.001

    monkeypatch.setattr(truth, "summarize_attention", wrong)
    with pytest.raises(AssertionError, match="relative error"):
        truth.attention(TOY, torch.float32)


def test_samples_hold_what_kernels_fail_on() -> None:
    tensors = truth.samples(torch.float16, toy=True)
    assert any(x.isnan().any() for x in tensors)
    assert any(x.isinf().any() for x in tensors)
    assert any(not x.is_contiguous() for x in tensors)
    assert {1, 4097} <= {x.numel() for x in tensors}


def test_models_agree_with_hooks_and_one_that_does_not_is_bad() -> None:
    (model, *_) = (one for one in zoo(toy=True) if one.dtype == torch.float64)
    compiled = truth.compiler(TOY.options)
    found = truth.compared_with_hooks(model, TOY, "compiled", compiled)
    assert found.is_good, found.text

    def inexact(graph: torch.fx.GraphModule, inputs: object) -> Callable[..., list[torch.Tensor]]:
        return lambda *given: [x * 1.001 for x in graph(*given)]

    bad = truth.compared_with_hooks(model, TOY, "compiled", truth.compiler({"backend": inexact}))
    assert bad.is_good is False
    assert "disagree with eager hooks" in bad.text
    other = replace(model, inputs=lambda: torch.ones(8, 3))
    failing = truth.compared_with_hooks(other, TOY, "compiled", compiled)
    assert failing.is_good is False
    assert "Error" in failing.text


def test_costs_are_told_first_by_time() -> None:
    found = list(costs.costs(TOY))
    kinds = [one.what.split(":")[0] for one in found]
    assert kinds[:3] == ["time"] * 3
    assert {"time", "launches", "peak memory"} == set(kinds)
    times = {one.what: one.numbers for one in found if one.what.startswith("time")}
    assert {f"time: {name}" for name in (costs.ACTIVATIONS, costs.EVERYTHING, costs.OFF)} < set(
        times
    )
    assert all(numbers["ratio"] > 0 for numbers in times.values())


@pytest.mark.slow
def test_everything_runs_on_a_toy(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(gpu.main)
    arguments = ["--device", "cpu", "--toy", "--folder", str(tmp_path), "--minutes", "20"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    kept = json.loads((tmp_path / "report.json").read_text())
    assert [one["name"] for one in kept["parts"]] == [one.name for one in PARTS]
    assert all(one["findings"] and not one["ended_by"] for one in kept["parts"])
    assert (tmp_path / "trace.json.gz").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(gpu.main)
    done = CliRunner().invoke(app, ["--folder", str(tmp_path / "report")])
    assert done.exit_code == 1
    assert done.output.strip() == "there is no GPU here: --device cpu --toy shows that it runs"
    assert not (tmp_path / "report").exists()


def test_parts_that_do_not_exist_are_refused() -> None:
    assert [one.name for one in gpu.chosen("costs; machine")] == ["machine", "costs"]
    with pytest.raises(typer.BadParameter, match="nothing is not one of machine; kernels"):
        gpu.chosen("nothing")
