"""A decoder split over processes in every way against the same training on one process."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.decoder import decoder
from tests.interpreters import Interpreters
from tests.mesh_trainings import EXPLAINED, PLAIN, UNDISTURBED, alone, layers
from tests.rank_trainings import Metrics
from tests.test_distributed import launch, result

MODULE = "tests.mesh_trainings"
IN_SHORT = ("sequence", "loss_in_parts", "dtensors_of_layers", "hybrid_shards")
FURTHER = (
    *("whole_sequence", "uncompiled", "whole_loss_in_parts", "plain_whole", "plain_blocks"),
    *("dtensors_eager", "dtensors_uncompiled", "hybrid_replicas"),
)
OF_FOUR = ("sharded_and_parallel", "hybrid_both", "replicas_uncompiled", "replicas_of_blocks")
OF_EACH_RANK = {"plain_blocks": {"norm"}}
"""Modules outside of compiled blocks of which nothing tells how ranks share their outputs."""


def run(interpreters: Interpreters, ranks: int, folder: Path, names: Sequence[str]) -> Path:
    done = launch(interpreters, ranks, folder, names, MODULE)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    """What two ranks have measured in each training."""
    return run(interpreters, 2, tmp_path_factory.mktemp("short"), IN_SHORT)


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    """The same of trainings that take longer."""
    return run(interpreters, 2, tmp_path_factory.mktemp("further"), FURTHER)


@cache
def expected(name: str) -> Metrics:
    if name == "dtensors_of_layers":
        return alone(layers)
    if name.startswith("dtensors"):
        return alone(lambda: decoder(PLAIN))
    return whole_decoder()


@cache
def whole_decoder() -> Metrics:
    return alone()


def noise(key: str, values: dict[str, float]) -> float:
    """Means about zero are known to a part of the size of what they are means of."""
    prefix, _, metric = key.rpartition("/")
    if metric in ("mean", "kurtosis", "min", "max"):
        return 1e-6 * float(values.get(f"{prefix}/rms", 1.0))
    return 1e-9


def check(found: Metrics, wanted: Metrics, of_each_rank: Set[str] = frozenset()) -> None:
    """All values are those of one process; ranks have values of their own of those modules alone.

    Losses and parameters are bitwise those of the training without tmm, on each rank.
    """
    own = {key.rpartition("[rank")[0].partition("/")[2] for key in found[EXPLAINED]} - {""}
    assert own == of_each_rank
    for step, values in wanted.items():
        if step < 0:
            continue
        shared = {key for key in found[step] if "[rank " not in key}
        left_out = {key for key in values if key.split("/")[1:2] and key.split("/")[1] in own}
        assert shared == set(values) - {k for k in left_out if k.startswith("activation")}
        for key in shared:
            value = values[key]
            np.testing.assert_allclose(
                found[step][key], value, rtol=1e-5, atol=noise(key, values), err_msg=key
            )
    assert all(found[UNDISTURBED]["ranks"])


@pytest.mark.parametrize("name", IN_SHORT)
def test_equals_the_training_on_one_process(short: Path, name: str) -> None:
    check(result(short, name), expected(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", FURTHER)
def test_so_do_further_trainings(further: Path, name: str) -> None:
    check(result(further, name), expected(name), OF_EACH_RANK.get(name, frozenset()))


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, interpreters: Interpreters) -> None:
    run(interpreters, 4, tmp_path, OF_FOUR)
    for name in OF_FOUR:
        check(result(tmp_path, name), expected(name))
