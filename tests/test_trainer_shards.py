"""FSDP in ``transformers.Trainer``: rows of one process, and the training as without tmm."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.interpreters import ROOT, Interpreters

pytestmark = pytest.mark.skipif(
    find_spec("transformers") is None or find_spec("accelerate") is None,
    reason="needs transformers and accelerate",
)
PROGRAM = "import sys; from tests.trainer_shards import main; main(*sys.argv[1:])"

# Of what has no items of a batch, such as the positions of GPT-2, each rank has its own.
OF_EACH_RANK = ("[loss]", "transformer.wpe/")


def measured(told: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    series: dict[str, dict[int, float]] = told["series"]
    return {key: values for key, values in series.items() if "/" in key and "system/" not in key}


def check(interpreters: Interpreters, folder: Path, way: str) -> None:
    done = interpreters.run_ranks(2, PROGRAM, folder, way, folder=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr[-5000:]
    alone = interpreters.run(PROGRAM, folder, "one", folder=ROOT)
    assert alone.returncode == 0, alone.stderr[-5000:]
    expected = measured(torch.load(folder / "one-0.pt"))
    told = [torch.load(folder / f"{way}-{rank}.pt") for rank in range(2)]
    assert all(rank["is_undisturbed"] for rank in told)
    assert all(rank["kinds"] == {"DTensor"} for rank in told)
    found = measured(told[0])
    assert found.keys() == expected.keys()
    assert {
        "activation/lm_head/rms",
        "gradient_before_clip/transformer.wte.weight/norm",
    } <= found.keys()
    for key, values in expected.items():
        assert found[key].keys() == values.keys(), key
        if not any(part in key for part in OF_EACH_RANK):
            wanted, got = list(values.values()), list(found[key].values())
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-12, err_msg=key)


def test_shards_of_a_trainer(tmp_path: Path, interpreters: Interpreters) -> None:
    check(interpreters, tmp_path, "shards")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["accumulated", "compiled", "checkpointed"])
def test_shards_in_other_ways(tmp_path: Path, interpreters: Interpreters, way: str) -> None:
    check(interpreters, tmp_path, way)
