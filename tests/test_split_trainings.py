"""Models that are split in several ways at once: ranks that fail, and collectives counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tmm
from tests.interpreters import Interpreters
from tests.split_trainings import LAST_STEP, PATIENCE
from tests.test_distributed import launch, result

MODULE = "tests.split_trainings"


def failed(interpreters: Interpreters, ranks: int, folder: Path, name: str) -> dict[str, Any]:
    """What rank 0 was told, after it was seen that the run has all that was recorded."""
    begun = time.monotonic()
    launch(interpreters, ranks, folder, [name], MODULE)
    assert time.monotonic() - begun < 150
    (record,) = tmm.list_runs(folder)
    assert record.status == "failed"
    with tmm.open_run(record.path) as run:
        assert run.steps.tolist()[:LAST_STEP] == list(range(LAST_STEP))
        for step in range(LAST_STEP):
            assert {"activation/norm/rms", "gradient/norm.weight/norm"} <= set(run.at(step))
        assert run.state.reason.startswith("RuntimeError: ")
        whole = {event.step for event in run.events if event.kind in ("gap", "partial")}
        assert whole == {LAST_STEP}
    told: dict[str, Any] = torch.load(folder / f"{name}-0.pt")
    return told


def check_killed(interpreters: Interpreters, ranks: int, folder: Path, way: str) -> None:
    told = failed(interpreters, ranks, folder, f"killed_{way}")
    # What gloo says of a connection that it has lost.
    assert any(word in told["error"] for word in ("peer", "Timed out", "pair closure"))
    assert told["seconds"] < 60
    assert not any("the training goes on" in text for text in told["warnings"])


def check_frozen(interpreters: Interpreters, ranks: int, folder: Path, way: str) -> None:
    told = failed(interpreters, ranks, folder, f"frozen_{way}")
    assert not any("the training goes on" in text for text in told["warnings"])
    assert "imed out" in told["error"] or "timeout" in told["error"]
    # The training's own wait, and that of the end of a run that fails.
    assert PATIENCE - 1 < told["seconds"] < PATIENCE + 10 + 30


def test_a_rank_that_dies(tmp_path: Path, interpreters: Interpreters) -> None:
    check_killed(interpreters, 2, tmp_path, "shards")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["tensor", "replicas"])
def test_a_rank_that_dies_in_other_ways(
    tmp_path: Path, interpreters: Interpreters, way: str
) -> None:
    check_killed(interpreters, 2, tmp_path, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replicas", "shards"])
def test_a_frozen_rank(tmp_path: Path, interpreters: Interpreters, way: str) -> None:
    check_frozen(interpreters, 2, tmp_path, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["replicas", "shards"])
def test_one_of_four_ranks_fails(tmp_path: Path, interpreters: Interpreters, way: str) -> None:
    for name, check in (("killed", check_killed), ("frozen", check_frozen)):
        folder = tmp_path / name
        folder.mkdir()
        check(interpreters, 4, folder, way)


EXPECTED = {"tensor": 5, "blocks": 5, "replicas": 0, "shards": 0}
"""Collectives of the training's groups that a monitored step makes besides its own: the sums of
gradients of norms, which DTensors leave to whoever reads them."""


def check_counts(folder: Path, way: str) -> None:
    counts = result(folder, f"counted_{way}")[0]
    plain, every = counts["plain"], counts["every"]
    assert len(set(plain)) == 1
    for step, (found, own) in enumerate(zip(counts["measured"], counts["own"], strict=True)):
        is_monitored = step % every == 0
        assert found == plain[step] + (EXPECTED[way] if is_monitored else 0), (way, step)
        assert (own > 0) == is_monitored, (way, step)


def test_collectives_of_steps(tmp_path: Path, interpreters: Interpreters) -> None:
    done = launch(interpreters, 2, tmp_path, ["counted_tensor"], MODULE)
    assert done.returncode == 0, done.stderr[-5000:]
    check_counts(tmp_path, "tensor")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "ways"), [(2, ["blocks", "replicas", "shards"]), (4, ["replicas", "shards"])]
)
def test_collectives_of_other_ways(
    tmp_path: Path, interpreters: Interpreters, ranks: int, ways: list[str]
) -> None:
    done = launch(interpreters, ranks, tmp_path, [f"counted_{way}" for way in ways], MODULE)
    assert done.returncode == 0, done.stderr[-5000:]
    for way in ways:
        check_counts(tmp_path, way)
