"""A decoder split as torchtitan splits one against the same training on one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from torch.distributed.fsdp._fully_shard import _fsdp_common

from tests.interpreters import Interpreters
from tests.rank_trainings import Metrics
from tests.test_distributed import launch, result
from tests.test_mesh_trainings import check
from tests.titan_trainings import WITH_EXPERTS, one_process

MODULE = "tests.titan_trainings"
OF_TWO = (
    *("full_checkpoints", "selective_checkpoints", "chunks", "chunks_uncompiled", "tensor"),
    *("all_of_two", "experts"),
)
OF_FOUR = ("all_of_four", "experts_of_four")
HAS_SEVERAL_MESHES = hasattr(_fsdp_common, "ShardPlacementResult")
IN_CHUNKS = ("chunks", "chunks_uncompiled", "all_of_two", "all_of_four", "experts_of_four")


@cache
def expected(*, has_chunks: bool, has_experts: bool) -> Metrics:
    shape = (WITH_EXPERTS,) if has_experts else ()
    return one_process(*shape, has_chunks=has_chunks)


def check_training(folder: Path, name: str) -> None:
    has_chunks, has_experts = name in IN_CHUNKS, "experts" in name
    check(result(folder, name), expected(has_chunks=has_chunks, has_experts=has_experts))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    """What two ranks have measured in each training."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(interpreters, 2, folder, OF_TWO, MODULE)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_TWO)
def test_two_ranks(two: Path, name: str) -> None:
    check_training(two, name)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, interpreters: Interpreters) -> None:
    done = launch(interpreters, 4, tmp_path, OF_FOUR, MODULE)
    assert done.returncode == 0, done.stderr[-5000:]
    for name in OF_FOUR:
        check_training(tmp_path, name)


@pytest.mark.skipif(not HAS_SEVERAL_MESHES, reason="torch shards one module over one mesh")
@pytest.mark.slow
def test_experts_and_the_rest_of_a_block_are_sharded_by_one_call(
    tmp_path: Path, interpreters: Interpreters
) -> None:
    done = launch(interpreters, 2, tmp_path, ["experts_together"], MODULE)
    assert done.returncode == 0, done.stderr[-5000:]
    check_training(tmp_path, "experts_together")


def test_two_ranks_in_short(tmp_path: Path, interpreters: Interpreters) -> None:
    done = launch(interpreters, 2, tmp_path, ["all_of_two"], MODULE)
    assert done.returncode == 0, done.stderr[-5000:]
    check_training(tmp_path, "all_of_two")
