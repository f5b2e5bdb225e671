"""Loops with Fabric, against the same training on one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.fabric_trainings import alone
from tests.interpreters import Interpreters
from tests.test_distributed import launch, result


def test_ddp_and_fully_shard(tmp_path: Path, interpreters: Interpreters) -> None:
    done = launch(interpreters, 2, tmp_path, ("ddp", "fsdp"), "tests.fabric_trainings")
    assert done.returncode == 0, done.stderr[-5000:]
    expected = alone(tmp_path / "alone", 2)
    for name in ("ddp", "fsdp"):
        found = result(tmp_path, name)
        for step, values in expected.items():
            assert found[step].keys() == values.keys()
            assert len(values) > 15
            for key, value in values.items():
                np.testing.assert_allclose(found[step][key], value, rtol=1e-5, err_msg=key)


def test_an_engine_of_deepspeed_is_refused_by_name() -> None:
    from torch import nn

    from tmm.spec.ranks import check_distributed

    class DeepSpeedEngine(nn.Sequential):
        pass

    with pytest.raises(ValueError, match="DeepSpeedEngine.*distributed=False"):
        check_distributed(DeepSpeedEngine(nn.Linear(2, 2)))
