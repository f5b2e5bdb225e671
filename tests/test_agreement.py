"""Replicas that are to hold the same parameters, bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import tmm
from tests.interpreters import Interpreters
from tests.test_distributed import launch, result
from tmm.steps.agreement import _factors

MODULE = "tests.agreement_trainings"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = launch(interpreters, 2, folder, ("ddp", "alone"), MODULE)
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


def test_replicas_that_agree(two: Path) -> None:
    found = result(two, "ddp")[0]
    assert found["values"] == {0: 0.0, 2: 0.0, 4: 0.0, 6: 0.0}
    assert not found["keys"]
    assert not found["events"]
    assert not found["warnings"]
    assert not any("replicas" in story.cause.kind for story in found["stories"])


def test_one_bit_of_one_rank_is_found(two: Path) -> None:
    found = result(two, "ddp")[1]
    name = "2.weight"
    assert found["values"] == {0: 0.0, 2: 0.0, 4: 1.0, 6: 1.0}
    assert found["keys"] == [f"step/replicas_differing/{name}"]
    assert [event.step for event in found["events"]] == [4, 6]
    (text,) = found["warnings"]
    assert f"1 of 6, first {name}, which rank" in text
    (story,) = (story for story in found["stories"] if story.cause.kind == "replicas_differ")
    assert (story.cause.severity, story.cause.step, story.cause.site) == ("critical", 4, name)
    assert "at step 2 they held the same" in story.cause.text


def test_it_is_an_alert(two: Path) -> None:
    found = result(two, "ddp")[2]
    assert [event.step for event in found["events"]] == [4, 6]
    assert found["values"][4] == 1.0


def test_it_takes_one_collective_each_so_many_steps(two: Path) -> None:
    agreeing = result(two, "ddp")[0]["counts"]
    usual = min(agreeing)
    extra = [count - usual for count in agreeing]
    assert extra[3::2] == [0, 0]  # in the step before the wrapper rebuilds its buckets
    assert extra[2::2] == [1, 1, 1]


def test_every_dtype_and_way(two: Path) -> None:
    found: dict[Any, Any] = result(two, "alone")[0]
    assert found["equal"]
    assert found["equal"].compared == 6
    for name in ("half", "double", "c"):
        assert found[f"{name} equal"]
        assert found[name].differing == ("3.weight",)
    assert found["order"].differing == ("2.weight", "3.bias")
    assert found["order"].first == "2.weight"
    assert found["order"].ranks
    assert found["sharded"]
    assert found["sharded"].compared == 0
    assert found["gathered"]
    assert found["gathered"].compared == 0
    assert found["others"].differing == ("all.bias",)
    assert found["others"].compared == 2
    assert not found["others"]


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, interpreters: Interpreters) -> None:
    done = launch(interpreters, 4, tmp_path, ("ddp", "hybrid", "alone"), MODULE)
    assert done.returncode == 0, done.stderr[-8000:]
    test_replicas_that_agree(tmp_path)
    test_every_dtype_and_way(tmp_path)
    (text,) = result(tmp_path, "ddp")[1]["warnings"]
    assert "which rank 1 and the others" in text
    agree, differ = result(tmp_path, "hybrid").values()
    assert set(agree["values"].values()) == {0.0}
    assert differ["values"] == {0: 0.0, 2: 0.0, 4: 1.0, 6: 1.0}


def test_one_process_has_no_replicas() -> None:
    found = tmm.replicas_agree(nn.Linear(2, 2))
    assert found
    assert found.compared == 0
    assert found.first is None
    with pytest.raises(TypeError, match="model=5 is not a module"):
        tmm.replicas_agree(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", range(1, 40))
def test_factors_cancel(count: int) -> None:
    factors = _factors(count)
    assert len(set(factors)) == len(factors) == count
    assert sum(factors) % 2**64 == 0
    assert count == 1 or all(factor % 2**63 for factor in factors)


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="replicas_agree=0 must be at least 1"):
        tmm.Spec(tmm.activation("rms"), replicas_agree=0)
    for wrong in (True, 1.5, "2"):
        with pytest.raises(TypeError, match="replicas_agree=.* is not a number of steps"):
            tmm.Spec(tmm.activation("rms"), replicas_agree=wrong)  # type: ignore[arg-type]
    assert "replicas_agree=7" in str(tmm.Spec(tmm.activation("rms"), replicas_agree=7))
