"""References of tensor parallel models, against the same comparison on one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.decoder import decoder
from tests.interpreters import Interpreters
from tests.mesh_trainings import FULL, Case, batches
from tests.parallel_reference_trainings import (
    ALL,
    EXPLAINED,
    TRAININGS,
    UNDISTURBED,
    floats_given,
    of_net,
    other_decoder,
    train,
)
from tests.rank_trainings import Metrics
from tests.sharded_reference_trainings import net, other_state, spec
from tests.test_distributed import launch, result

MODULE = "tests.parallel_reference_trainings"
OF_AN_INPUT = "an input of the graph, of which no DTensor says how ranks share it"
SPLIT = "its norms are of rows, which are split over ranks"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    """What two ranks have measured in each training."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(interpreters, 2, folder, tuple(TRAININGS), MODULE)
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


@cache
def alone(kind: str, *, is_other: bool) -> Metrics:
    """On one process, uncompiled."""
    torch._dynamo.reset()
    model: Any = net() if kind == "blocks" else decoder(FULL)
    case = of_net(model, model) if kind == "blocks" else Case(model, model)
    other: Callable[[], Any] = other_state if kind == "blocks" else other_decoder
    reference = other() if is_other else "init"
    given = floats_given() if kind == "blocks" else batches()
    return train(case, given, spec(reference, *ALL))[0]


def check(found: Metrics, expected: Metrics, least: int, *, has_checks: bool = True) -> None:
    """Values are equal; but for norms of split rows, which each rank has by itself, all are."""
    assert found[UNDISTURBED]["ranks"] == [True, True]
    assert found[EXPLAINED]["unmeasured"].keys() <= {"watch(optimizer)"}
    apart = found[EXPLAINED]["by_rank"]
    assert {*apart.values()} <= {SPLIT, OF_AN_INPUT}
    assert all(key.startswith("RCC") for key in apart)
    compared = 0
    for step in range(3):
        for key, value in expected[step].items():
            if key.startswith("RCC") and not has_checks:
                continue
            site, metric = key.rsplit("/", 1)
            if key not in found[step]:
                assert f"{site}[rank 0]" in apart, key
                assert f"{site}[rank 1]/{metric}" in found[step]
                continue
            if "difference" in key and value == 0.0:
                assert found[step][key] == 0.0, key
            of_outputs = expected[step].get(f"activation/{key.split('/')[1]}/rms", 1.0)
            np.testing.assert_allclose(
                found[step][key], value, rtol=1e-5, atol=5e-7 * of_outputs, err_msg=f"{step} {key}"
            )
            compared += 1
        joined = {key for key in found[step] if "[rank" not in key}
        assert joined <= expected[step].keys()
    assert compared >= least


@pytest.mark.parametrize("name", ["blocks", "blocks_uncompiled", "blocks_file"])
def test_columns_and_rows(two: Path, name: str) -> None:
    found, expected = result(two, name), alone("blocks", is_other=name == "blocks_file")
    check(found, expected, least=200)
    assert "RCC (W_t-W_0)x_t/blocks.0.down/l2norm" in found[2]
    assert "RCC (W_t-W_0)x_t/blocks.0.up[rank 1]/l2norm" in found[2]
    assert found[2]["activation_difference/blocks.0.up/relative_norm"] > 0.01


def test_blocks_that_no_graph_holds(two: Path) -> None:
    expected = alone("blocks", is_other=True)
    check(result(two, "outside_of_graphs"), expected, least=180, has_checks=False)


@pytest.mark.parametrize(
    "name",
    ["whole_sequence", "sequence_by_blocks", "sequence_uncompiled", "sequence_uncompiled_other"],
)
def test_sequence_parallel(two: Path, name: str) -> None:
    found = result(two, name)
    is_other = name in ("sequence_by_blocks", "sequence_uncompiled_other")
    has_checks = name.startswith("sequence_uncompiled")
    expected = alone("sequence", is_other=is_other)
    check(found, expected, least=600 if has_checks else 300, has_checks=has_checks)
    assert found[2]["activation_difference/layers.1/relative_norm"] > 0.01


def test_a_bias_that_is_split_and_an_output_that_is_not(two: Path) -> None:
    found = result(two, "gathered_output")
    assert found[UNDISTURBED]["ranks"] == [True, True]
    assert "RCC (W_t-W_0)x_t/first/l2norm" in found[2]
    assert "RCC (W_t-W_0)x_t/first.weight/l2norm" not in found[2]
    assert "share its bias" in str(found[EXPLAINED]["unmeasured"])


@pytest.mark.parametrize("rank", [0, 1])
def test_what_ends_the_comparison_on_one_rank_disturbs_no_other(two: Path, rank: int) -> None:
    found = result(two, f"reads_on_{rank}")
    assert found[UNDISTURBED]["ranks"] == [True, True]
    for step in range(3):
        assert "activation/layers.1/rms" in found[step]
        compared = {key.split("/")[1] for key in found[step] if "_difference/" in key}
        assert "layers.0.feed_forward" in compared
        assert not any(name.startswith(("layers.1", "output", "[root")) for name in compared)
    assert rank == 1 or "the program read" in str(found[EXPLAINED]["unmeasured"])


def test_what_is_refused(two: Path) -> None:
    errors = result(two, "refused")[0]["errors"]
    assert len(errors) == 3
    assert all("tmm.parameter_difference can be measured" in error for error in errors)
    parts = ("distributed=False", "reference_samples", "fully_shard")
    for part, error in zip(parts, errors, strict=True):
        assert part in error


def test_norms_of_split_rows_are_those_of_each_part(two: Path) -> None:
    found, model, given = result(two, "blocks_uncompiled"), net(), list[torch.Tensor]()
    model.blocks[0].down.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))  # type: ignore[union-attr]
    with torch.no_grad():
        model(floats_given()[0][0])
    for rank, part in enumerate(given[0].chunk(2, dim=-1)):
        expected = part.norm(dim=-1).mean().item()
        key = f"RCC x_t/blocks.0.down[rank {rank}]/l2norm"
        assert found[0][key] == pytest.approx(expected, rel=1e-5)
