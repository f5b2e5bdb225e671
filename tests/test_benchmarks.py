from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import __main__ as suite
from benchmarks import check, growth
from benchmarks.alternatives import ALL
from benchmarks.alternatives.__main__ import attach, over_ours, reason
from benchmarks.alternatives.interface import EAGER
from benchmarks.check import Expected, Ratio
from benchmarks.everything import Cadence
from benchmarks.report import Line, cells, timed, with_goal
from benchmarks.timing import Timing, environment, interleave, median_interval
from benchmarks.workloads import GPT_TOY
from tests.interpreters import ROOT, Interpreters

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
)


def suite_report(**ratios: tuple[float, float]) -> dict[str, Any]:
    lines = [
        {"variant": variant, "ratio": ratio, "low": ratio - noise, "high": ratio + noise}
        for variant, (ratio, noise) in ratios.items()
    ]
    return {"machine": "made-up", "questions": {"everything": {"report": {"lines": lines}}}}


def test_every_file_imports() -> None:
    for name in MODULES:
        importlib.import_module(name.removesuffix(".__init__"))


def test_optional_packages_are_imported_only_where_they_are_used(
    interpreters: Interpreters,
) -> None:
    program = "import sys, benchmarks.alternatives.__main__; print(*sys.modules)"
    done = interpreters.run(program, folder=ROOT)
    loaded = set(done.stdout.split())
    assert "benchmarks.alternatives.wandb_watch" in loaded
    assert not loaded & ({a.package for a in ALL} | {"transformers"})


def test_blocks_are_sums_of_rounds_that_follow_each_other() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 5.0), (1.0,) * 5).in_blocks(2)
    assert timing.seconds == (3.0, 7.0)
    assert timing.ratios == [1.5, 3.5]


def test_added_time_is_taken_round_by_round() -> None:
    own, base = Timing((3.0, 5.0), (1.0, 1.0)), Timing((1.0, 4.0), (1.0, 1.0))
    assert own.against(base).added == [2.0, 1.0]


def test_median_interval_covers_the_median_19_of_20_times() -> None:
    generator = np.random.default_rng(0)
    samples = generator.lognormal(size=(2000, 60))
    intervals = [median_interval(sample) for sample in samples]
    covered = np.mean([low <= 1.0 <= high for low, high in intervals])
    assert 0.93 < covered < 0.99


def test_variants_run_once_in_each_round() -> None:
    calls: list[str] = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = interleave(variants, rounds=4, warm_up=2)
    assert [sorted(calls[i : i + 3]) for i in range(0, 18, 3)] == [["a", "b", "c"]] * 6
    assert all(len(timing.seconds) == 4 for timing in timings.values())
    calls.clear()
    interleave(variants, rounds=1, warm_up=0, settle=2)
    assert calls[::3] == calls[1::3] == calls[2::3]
    assert sorted(calls[::3]) == ["a", "b", "c"]


def test_slope_of_added_time_is_found_with_its_interval() -> None:
    generator = np.random.default_rng(1)
    sizes = (10, 100, 1000)
    added = [1e-6 * (50 + 3 * size) + generator.normal(0, 1e-5, 40) for size in sizes]
    found = growth.fit(sizes, [list(rounds) for rounds in added])
    low, high = found.slope_interval
    assert low < 3 < high
    assert high - low < 0.05
    assert found.intercept_interval[0] < 50 < found.intercept_interval[1]


def test_every_tenth_step_is_monitored() -> None:
    watched = Mock()
    cadence = Cadence(watched, 10)
    for _ in range(2 * 25):
        cadence()
    asked = [call.kwargs["monitored"] for call in watched.run.call_args_list]
    assert not any(asked[0::2]), "steps that others come behind"
    assert [step for step, monitored in enumerate(asked[1::2]) if monitored] == [0, 10, 20]
    assert [step for step, monitored in enumerate(cadence.monitored) if monitored] == [0, 10, 20]


def test_a_goal_is_met_or_missed() -> None:
    line = timed("x", Timing((1.1, 1.1, 1.1), (1.0, 1.0, 1.0)))
    assert line.is_met is None
    assert with_goal(line, at_most=1.2).is_met
    assert not with_goal(line, at_most=1.05).is_met
    assert not with_goal(line, at_least=10).is_met
    assert Line("failed", at_most=1.0).is_met is None


def test_a_line_of_an_older_kind_of_report_is_shown() -> None:
    shown = cells({"variant": "x", "milliseconds": 1.0, "ratio": 2.0, "low": 1.5, "high": 2.5})
    assert shown == ("x", "1.00", "2.0000", "1.5000 to 2.5000", "", "")


def test_what_others_add_is_taken_over_what_tmm_adds() -> None:
    line = over_ours("hooks", [0.010] * 9, [0.001] * 9)
    assert line.ratio == pytest.approx(10)
    assert over_ours("hooks", [0.010] * 9, [-0.001] * 9).ratio is None


def test_a_failure_without_a_message_names_the_line() -> None:
    with pytest.raises(AssertionError) as raised:
        check_without_a_message(0)
    assert reason(raised.value) == "raise AssertionError (test_benchmarks.py)"
    assert reason(ValueError("first\nsecond")) == "first"


def check_without_a_message(number: int) -> None:
    if not number:
        raise AssertionError


def test_the_check_accepts_noise_and_fails_in_both_directions() -> None:
    expected = {"everything: x": Expected(1.10, 0.02)}

    def found(ratio: float, noise: float = 0.0) -> list[str]:
        return check.problems({"everything: x": Ratio(ratio, noise)}, expected)

    assert not found(1.11)
    assert not found(1.13, 0.015)
    assert "expected" in found(1.13)[0]
    assert "a gain without a reason" in found(1.07)[0]
    assert "too noisy" in found(1.10, 0.05)[0]


def test_the_check_fails_for_what_is_missing_and_what_is_new() -> None:
    problems = check.problems({"new": Ratio(1.0, 0.0)}, {"old": Expected(1.0, 0.1)})
    assert len(problems) == 2
    assert "old: not measured" in problems[0]


def test_the_check_updates_and_then_agrees(tmp_path: Path) -> None:
    report, expected = tmp_path / "report.json", tmp_path / "expected.json"
    variant = check.WATCHED["everything"][0]
    report.write_text(json.dumps(suite_report(**{variant: (1.02, 0.03), "other": (9.0, 0.1)})))
    expected.write_text("{}")
    app = typer.Typer()
    app.command()(check.main)
    arguments = [str(report), "--expected", str(expected)]
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert CliRunner().invoke(app, [*arguments, "--update"]).exit_code == 0
    assert check.load(expected) == {
        "made-up": {f"everything: {variant}": Expected(1.02, pytest.approx(0.03))}
    }
    assert CliRunner().invoke(app, arguments).exit_code == 0
    report.write_text(json.dumps(suite_report(**{variant: (1.2, 0.01)})))
    assert CliRunner().invoke(app, arguments).exit_code == 1


def test_the_checked_in_expectations_can_be_read() -> None:
    for values in check.load(check.EXPECTED).values():
        assert values
        assert {name.split(":")[0] for name in values} <= check.WATCHED.keys()


def test_the_suite_selects_questions() -> None:
    assert list(suite.selected("", quick=False, toy=False)) == list(suite.QUESTIONS)
    quick = suite.selected("", quick=True, toy=False)
    assert quick.keys() < suite.QUESTIONS.keys()
    assert set(quick.values()) == {("--quick",)}
    assert suite.selected("attention", quick=False, toy=False) == {"attention": ()}
    with pytest.raises(typer.BadParameter, match="nothing is not one of"):
        suite.selected("nothing", quick=False, toy=False)


def test_a_question_that_fails_is_kept_with_its_message(tmp_path: Path) -> None:
    found = suite.run_question("no_such_question", (), str(tmp_path))
    assert "no module named benchmarks.no_such_question" in found["error"].lower()
    assert suite.lines_of(found)[0]["variant"] == "FAILED"


def test_a_report_says_where_and_how_it_was_made() -> None:
    found = environment()
    assert {"torch", "tmm", "device", "threads", "compile", "seeds"} <= found.keys()
    assert all(found.values())


def values_of(name: str) -> Mapping[str, float]:
    (alternative,) = (one for one in ALL if one.name == name)
    if alternative.package is not None:
        pytest.importorskip(alternative.package)
    attached, step = attach(alternative, GPT_TOY)
    step()
    values = step()
    attached.close()
    return values


SAME_WORK = [alternative for alternative in ALL if alternative.same_work]
FAILING = "leaf functions"  # under Inductor of torch 2.13; "leaf functions, aot_eager" is not
# nnsight changes the process that imports it.
QUICK = [a.name for a in SAME_WORK if a.base == EAGER and a.package != "nnsight"]


@pytest.mark.parametrize("name", QUICK)
def test_uncompiled_alternatives_give_the_same_numbers(name: str) -> None:
    assert values_of(name) == pytest.approx(values_of("forward hooks"), rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", [a.name for a in SAME_WORK if a.name not in {*QUICK, FAILING}])
def test_all_alternatives_give_the_same_numbers(name: str) -> None:
    assert values_of(name) == pytest.approx(values_of("forward hooks"), rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_the_suite_runs_on_a_toy_and_its_report_can_be_checked(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--toy", "--save"],
        cwd=ROOT,
        env={**os.environ, suite.FOLDER_VARIABLE: str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("suite-*.json")
    report = json.loads(path.read_text())
    toy = [name for name, forms in suite.QUESTIONS.items() if "--toy" in forms]
    assert list(report["questions"]) == toy
    names = [line["variant"] for line in report["questions"]["alternatives"]["report"]["lines"]]
    assert {alternative.name for alternative in ALL} <= set(names)
    watched = [f"{name}: {v}" for name, variants in check.WATCHED.items() for v in variants]
    assert check.ratios(report).keys() == set(watched)
