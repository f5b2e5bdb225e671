"""Tensor parallel trainings on several processes against the same ones on one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import tmm
from tests.interpreters import Interpreters
from tests.rank_trainings import Metrics, batches
from tests.tensor_parallel_trainings import EXPLAINED, TRAININGS, alone, model
from tests.test_distributed import _noise, launch, result

MODULE = "tests.tensor_parallel_trainings"
SAME = ("whole", "uncompiled", "blocks", "declared", "sequence")
ONE_BLOCK = ("whole", "uncompiled")
OF_FOUR = ("whole_of_two_blocks", "empty", "two_dimensions", "undisturbed_eager")
OF_A_RANK = re.compile(r"\[rank (\d)\]")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    """What two ranks have measured in each training."""
    folder = tmp_path_factory.mktemp("two")
    names = (name for name in TRAININGS if name not in OF_FOUR)
    done = launch(interpreters, 2, folder, names, MODULE)
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


@cache
def expected(**options: Any) -> Metrics:
    torch._dynamo.reset()
    return alone(**options)


def check(found: Metrics, wanted: Metrics, ranks: int = 2, *, alike: bool = True) -> set[str]:
    """What is joined is equal, and so is what each rank has; gives the sites that ranks name.

    Nothing else is missing but what ``tmm.explain`` names. Without ``alike``, ranks have shares of
    the batch.
    """
    explained = found[EXPLAINED]
    by_rank = set()
    for step, values in wanted.items():
        seen = set()
        largest: dict[str, list[float]] = {}
        for key, value in found[step].items():
            rank = OF_A_RANK.search(key)
            name = OF_A_RANK.sub("", key)
            if rank is not None:
                place = int(rank[1])
                by_rank.add(OF_A_RANK.sub("", key.rpartition("/")[0] or key))
                if place == 0:
                    assert (key.rpartition("/")[0] or key) in explained
                if name.endswith("/largest"):
                    largest.setdefault(name, []).append(value)
                    continue
            seen.add(name)
            if rank is None or alike:
                np.testing.assert_allclose(
                    value, values[name], rtol=1e-5, atol=_noise(name, values), err_msg=key
                )
        for name, parts in largest.items():
            seen.add(name)
            assert 1 < len(parts) <= ranks  # an empty part has no value
            assert max(parts) == pytest.approx(values[name], rel=1e-5)
        assert not seen - set(values)
        for key in set(values) - seen:
            _, _, rest = key.partition("/")
            assert repr(rest.rpartition("/")[0]) in explained["unmeasured"] or not alike, key
    return by_rank


@pytest.mark.parametrize("name", SAME)
def test_equals_the_training_on_one_process(two: Path, name: str) -> None:
    count = 1 if name in ONE_BLOCK else 2
    by_rank = check(result(two, name), expected(blocks=count))
    outputs = {site.partition("/")[2] for site in by_rank if site.startswith("activation/")}
    parts = {f"blocks.{block}.up" for block in range(count)}  # whose function sees parts
    if name in ("whole", "uncompiled", "declared"):
        assert outputs == parts
    if name == "blocks":
        # What runs between the blocks, and is no DTensor.
        assert outputs == parts | {"side", "norm"}
    if name == "sequence":
        norms = {f"blocks.{block}.{norm}" for block in range(2) for norm in ("norm", "second_norm")}
        assert outputs == parts | norms | {"side", "norm"}
    gradients = {site.partition("/")[2] for site in by_rank if site.startswith("activation_gr")}
    assert gradients == (set() if name in ONE_BLOCK else {"side", "norm"})


def test_parts_of_different_sizes(two: Path) -> None:
    check(result(two, "uneven"), expected(hidden=7, blocks=1))


def test_random_numbers_of_ranks(two: Path) -> None:
    found = result(two, "with_dropout")
    assert "activation/blocks.0.dropout[rank 1]/rms" in found[0]
    assert "activation/blocks.0.down/rms" in found[0]
    assert "random" in found[EXPLAINED]["activation/blocks.0.dropout[rank 0]"]
    for part in ("blocks.0.norm", "blocks.0.attention.query", "blocks.0.attention.out"):
        key = f"activation/{part}/rms"
        assert found[0][key] == pytest.approx(expected(blocks=1)[0][key], rel=1e-5)


def test_explain_says_what_is_not_joined_and_how_to_settle_it(two: Path) -> None:
    text = result(two, "blocks")[EXPLAINED]["text"]
    assert 'placements={regular expression: "shard" or "replicate"}' in text
    assert "    activation/side[rank 0]: it was measured outside of graphs" in text


def test_each_rank_by_itself_has_its_parts(two: Path) -> None:
    (found,) = result(two, "by_itself").values()
    net = model(hidden=7)
    seen: dict[str, torch.Tensor] = {}
    net.blocks[0].up.register_forward_hook(lambda m, a, output: seen.update(up=output))
    net(batches()[0])
    part = seen["up"][..., :4].norm().item()
    assert found["activation/blocks.0.up/norm"] == pytest.approx(part, rel=1e-5)
    weight = net.blocks[0].up.weight[:4].norm().item()
    assert found["parameter/blocks.0.up.weight/norm"] == pytest.approx(weight, rel=1e-5)


def test_trainings_are_not_disturbed(two: Path) -> None:
    for losses in result(two, "undisturbed").values():
        assert losses["plain"] == losses["measured"]


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, interpreters: Interpreters) -> None:
    done = launch(interpreters, 4, tmp_path, ["sequence", *OF_FOUR], MODULE)
    assert done.returncode == 0, done.stderr[-5000:]
    check(result(tmp_path, "whole_of_two_blocks"), expected(blocks=2), 4)
    check(result(tmp_path, "sequence"), expected(blocks=2), 4)
    check(result(tmp_path, "empty"), expected(hidden=5, blocks=1), 4)
    check(result(tmp_path, "two_dimensions"), expected(blocks=2), 4, alike=False)
    for losses in result(tmp_path, "undisturbed_eager").values():
        assert losses["plain"] == losses["measured"]


@pytest.fixture
def four() -> Iterator[None]:
    """The first of four ranks, the others of which do not exist."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        ({"0": "sharded"}, "'shard' where each rank has a part"),
        ({"(": "shard"}, "no regular expression"),
        ({"block": "shard"}, r"matches none of the 3 modules.*'\[root module\]', '0', '1'"),
    ],
)
def test_placements_that_cannot_be(placements: dict[str, str], message: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(ValueError, match=f"^placements=.*{message}"):
        tmm.instrument(net, tmm.Spec(tmm.activation("rms")), placements=placements)


@pytest.mark.usefixtures("four")
@pytest.mark.parametrize(
    ("asked", "options", "reason"),
    [
        ({}, {"distributed": False}, "all ranks compute that of the reference together"),
        ({"reference_samples": 1}, {}, "reference_samples= cannot tell apart"),
    ],
)
def test_what_is_not_supported_is_refused(
    asked: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tp"))
    spec = tmm.Spec(tmm.activation_difference("rms"), reference="init", **asked)
    net = parallelize_module(nn.Sequential(nn.Linear(4, 4)), mesh["tp"], {"0": ColwiseParallel()})
    text = f"reference=: the forward pass of the model is split over ranks .*{reason}"
    with pytest.raises(ValueError, match=text):
        tmm.instrument(net, spec, **options)
