from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

from benchmarks.bill import process
from benchmarks.bill.imports import import_lines, time_imports
from benchmarks.bill.lines import COLD, FRESH, WARM, lines_of, table_of
from benchmarks.bill.tasks import Task, tasks
from benchmarks.bill.variants import EACH, PLAIN, QUICK, TENTH, VARIANTS, Variant
from benchmarks.compilation import ProcessError, bill_of, chosen_variants, measure, run_process
from tmm.examples.gpt import GPT

TASKS = tasks(toy=True)
BY_NAME = {variant.name: variant for variant in VARIANTS}
STEPS = 11


@contextmanager
def own_settings() -> Iterator[None]:
    """What a variant sets of Dynamo's, for its process, is as it was afterwards."""
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield
    torch._dynamo.reset()


def train(task: str, variant: str, steps: int = STEPS) -> process.Run:
    with own_settings():
        run = process.train(TASKS[task], BY_NAME[variant], steps, backend="eager")
        run.attached.close()
    return run


def without_family(values: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix("activation/"): value for key, value in values.items()}


@pytest.fixture(scope="module")
def by_hooks() -> dict[str, process.Run]:
    return {task: train(task, "forward hooks, not compiled, every=1") for task in TASKS}


@pytest.mark.parametrize(
    ("task", "variant"),
    [
        ("breaks", TENTH),
        ("blocks", "tmm, every=10, programs=2"),
        ("breaks", "by hand, traced, every=10"),
        ("blocks", "by hand, an operator, every=10"),
    ],
)
def test_variants_give_the_same_values_in_their_steps(
    task: str, variant: str, by_hooks: dict[str, process.Run]
) -> None:
    check_values(train(task, variant), BY_NAME[variant], by_hooks[task])


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("variant", [one.name for one in VARIANTS if one.same_work])
def test_all_variants_give_the_same_values_in_their_steps(
    task: str, variant: str, by_hooks: dict[str, process.Run]
) -> None:
    if BY_NAME[variant].package is not None:
        pytest.importorskip(str(BY_NAME[variant].package))
    check_values(train(task, variant), BY_NAME[variant], by_hooks[task])


def check_values(found: process.Run, variant: Variant, expected: process.Run) -> None:
    assert list(found.ends) == sorted(found.ends)
    assert len(found.values) == STEPS
    for step, values in enumerate(found.values):
        if step % variant.every:
            assert not values
        else:
            wanted = pytest.approx(dict(expected.values[step]), rel=1e-3, abs=1e-5)
            assert without_family(values) == wanted


@pytest.mark.parametrize("variant", [one.name for one in VARIANTS if not one.same_work])
def test_other_variants_train(variant: str) -> None:
    assert len(train("GPT", variant, 2).ends) == 2


def test_calls_placed_by_hand_do_not_change_the_training() -> None:
    states = []
    for name in (PLAIN, "by hand, traced, every=10"):
        model = TASKS["GPT"].model()
        with own_settings():
            process.train(Given(TASKS["GPT"], model), BY_NAME[name], 3, backend="eager")
        states.append(model.state_dict())
    plain, noted = states
    assert all(torch.equal(plain[key], noted[key]) for key in plain)


class Given(Task):
    """A task whose model one has."""

    def __init__(self, task: Task, model: GPT) -> None:
        super().__init__(task.workload, task.compile, task.breaks)
        object.__setattr__(self, "_model", model)

    def model(self) -> GPT:
        model: GPT = self._model  # type: ignore[attr-defined]
        return model


def test_torch_alone_is_imported_before_the_clock_starts(tmp_path: Path) -> None:
    program = "import sys, benchmarks.bill.process; print(*sys.modules)"
    loaded = set(run_process(["-c", program], tmp_path).split())
    assert "benchmarks.bill.variants" in loaded
    assert not loaded & {"torch._dynamo", "torch._inductor", "tmm.core", "torch_module_monitor"}


def test_a_process_that_fails_is_told_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="SystemExit|no"):
        run_process(["-c", "import sys; sys.exit('no')"], tmp_path)


def made_up(seconds: float, peak: int = 100) -> dict[str, Any]:
    compiled = {"graphs": 1, "breaks": 0, "kernels": 7, "bytes_moved": 2_000_000}
    return {"first_step": seconds / 2, "all_steps": seconds, "peak_bytes": peak, **compiled}


def test_variants_take_turns_and_each_cold_process_has_our_kernels(tmp_path: Path) -> None:
    (tmp_path / "tmm").mkdir()
    (tmp_path / "tmm" / "kernel.so").touch()
    calls: list[tuple[str, list[str]]] = []

    def run(task: str, variant: str, cache: Path) -> dict[str, Any]:
        calls.append((variant, sorted(path.name for path in cache.iterdir())))
        (cache / "left").touch()
        return made_up(1.0)

    variants = [BY_NAME[PLAIN], BY_NAME[TENTH]]
    found, failed = measure("GPT", variants, 2, run, tmp_path)
    turn = [(PLAIN, ["tmm"]), (PLAIN, ["left", "tmm"]), (TENTH, ["tmm"]), (TENTH, ["left", "tmm"])]
    assert calls == [*turn, (TENTH, []), *turn]
    assert not failed
    assert {kind: len(runs) for kind, runs in found[TENTH].items()} == {COLD: 2, WARM: 2, FRESH: 1}


def test_a_variant_that_fails_is_told_and_others_go_on(tmp_path: Path) -> None:
    def run(task: str, variant: str, cache: Path) -> dict[str, Any]:
        if variant == TENTH:
            raise ProcessError("it broke")
        return made_up(1.0)

    variants = [BY_NAME[PLAIN], BY_NAME[TENTH], BY_NAME[EACH]]
    found, failed = measure("GPT", variants, 2, run, None)
    assert failed == {TENTH: "fails: it broke"}
    lines = lines_of("GPT", variants, found, failed)
    assert [line.note for line in lines if TENTH in line.variant] == ["fails: it broke"]
    assert len(found[EACH][COLD]) == 2


def test_lines_have_ratios_of_the_same_round_ranges_and_goals() -> None:
    found = {
        PLAIN: {COLD: [made_up(10.0), made_up(20.0)], WARM: [made_up(2.0), made_up(4.0)]},
        TENTH: {
            COLD: [made_up(12.0), made_up(22.0)],
            WARM: [made_up(2.1, 110), made_up(4.1, 130)],
            FRESH: [made_up(15.0)],
        },
    }
    variants = [BY_NAME[PLAIN], BY_NAME[TENTH]]
    lines = {line.variant: line for line in lines_of("GPT", variants, found, {})}
    cold = lines[f"GPT: {TENTH}, all steps, cold cache"]
    assert cold.ratio == pytest.approx((1.2 + 1.1) / 2)
    assert (cold.low, cold.high) == (pytest.approx(1.1), pytest.approx(1.2))
    assert cold.milliseconds == pytest.approx(17_000)
    assert cold.at_most == 1.15
    assert cold.note == "1 graphs, 0 breaks, 7 kernels, 2 MB moved"
    assert lines[f"GPT: {TENTH}, all steps, warm cache"].at_most == 1.05
    assert lines[f"GPT: {TENTH}, first step, warm cache"].at_most == 1.1
    assert lines[f"GPT: {TENTH}, first step, cold cache"].at_most is None
    assert lines[f"GPT: {TENTH}, all steps, first run on a machine"].ratio == 1.5
    assert lines[f"GPT: {TENTH}, peak memory"].ratio == pytest.approx(1.2)
    console = Console(width=180, record=True)
    console.print(table_of("", variants, found))
    assert "17.00 s  1.15" in console.export_text()


def test_imports_are_held_to_seconds() -> None:
    own, names = import_lines([[2.0, 0.03, 3.0, 0.6]])
    assert own.ratio == pytest.approx(0.1)
    assert own.is_met
    assert names.is_met is False
    assert names.milliseconds == pytest.approx(600)


@pytest.mark.slow
def test_imports_are_timed_in_a_process_of_its_own() -> None:
    times = time_imports()
    assert len(times) == 4
    assert min(times) > 0


def test_chosen_variants_begin_with_the_plain_one() -> None:
    assert chosen_variants("", quick=False) == list(VARIANTS)
    assert [one.name for one in chosen_variants("", quick=True)] == list(QUICK)
    assert [one.name for one in chosen_variants(TENTH, quick=True)] == [PLAIN, TENTH]
    with pytest.raises(typer.BadParameter, match="nothing"):
        chosen_variants("nothing", quick=False)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_toy_is_billed_in_fresh_processes(task: str, tmp_path: Path) -> None:
    found = bill_of(task, TENTH, tmp_path, "--toy", "--steps", "2")
    assert 0 < found["first_step"] < found["all_steps"]
    assert found["graphs"] > 0
    assert found["values"] > 100
    assert found["peak_bytes"] > 1e8
