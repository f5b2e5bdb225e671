"""A reduced run of the benchmark of planted faults: causes are named, healthy runs left alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from benchmarks.diagnosis.__main__ import Outcome, lines_of, outcome, plantings
from benchmarks.diagnosis.faults import FAULTS, NOT_TOLD
from benchmarks.diagnosis.healthy import healthy
from benchmarks.diagnosis.scoring import Said, says
from benchmarks.diagnosis.training import train

FEW = ("learning_rate_too_high", "units_die", "layer_without_optimizer", "nan_in_data")
TWO = ("mlp", "cnn")
STEPS = 40


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(threads)


def test_causes_are_named_first() -> None:
    planted = [
        (fault, training)
        for fault, training in plantings(quick=False, held_out=False, only=FEW)
        if training.seed == 0 and training.task.name in TWO
    ]
    assert len(planted) == len(FEW) * len(TWO)
    for fault, training in planted:
        training.steps = STEPS
        found = outcome(fault, training)
        assert found.place == 0, found


@pytest.mark.slow
def test_each_cause_is_named_first_in_some_model() -> None:
    missed = [
        found
        for fault, training in plantings(quick=True, held_out=False)
        if (found := outcome(fault, training)).place != 0
    ]
    assert len(missed) <= len(FAULTS) // 10, missed


def _alarms(
    tmp_path: Path, count: int | None = None, steps: int | None = None
) -> dict[str, list[str]]:
    found = {}
    for place, (name, training) in enumerate(islice(healthy(), count)):
        training.steps = steps or training.steps
        said = says(train(training, tmp_path / str(place)))
        found[name] = [str(one) for one in said if one.severity != "low"]
    return {name: alarms for name, alarms in found.items() if alarms}


def test_healthy_trainings_are_left_in_peace(tmp_path: Path) -> None:
    assert not _alarms(tmp_path, 4, STEPS)


@pytest.mark.slow
def test_all_healthy_trainings_are_left_in_peace(tmp_path: Path) -> None:
    assert not _alarms(tmp_path)


def test_scores_are_shares_of_what_was_planted() -> None:
    said = (Said("dead_units", "high", "activation/1/zero_fraction", "1", 3),)
    outcomes = [Outcome("units_die", "mlp", seed, said, place) for seed, place in enumerate((0, 2))]
    peace = {"a": said, "b": ()}
    assert [line.ratio for line in lines_of(outcomes, peace)] == [0.5, 1.0, 1, 0.0]


def test_what_cannot_be_told_is_listed_with_the_reason() -> None:
    assert not NOT_TOLD.keys() & FAULTS.keys()
    assert all(NOT_TOLD.values())
