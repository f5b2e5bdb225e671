"""Where tensors lie that are handed to the training's own process group."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tmm.spec.ranks import Ranks
from tmm.steps import agreement, averaged_gradients
from tmm.steps.agreement import ReplicaCheck
from tmm.steps.averaged_gradients import GradientAverage


class Reached(Exception):  # noqa: N818 (no error: it ends the test where a collective begins)
    """A collective was begun with a tensor on this device."""


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A group that takes tensors of one device alone, as NCCL's do; not that of the parameters."""

    def reached(tensor: torch.Tensor, *_: Any, **__: Any) -> None:
        raise Reached(str(tensor.device))

    def alike(everywhere: list[Any], own: object, **_: Any) -> None:
        everywhere[:] = [own] * len(everywhere)

    taken = torch.device("meta")
    monkeypatch.setattr(agreement, "is_joined", lambda: True)
    for place in (agreement, averaged_gradients):
        monkeypatch.setattr(place, "device_of_collectives", lambda *_: taken)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(dist, "all_gather_object", alike)
    monkeypatch.setattr(dist, "all_reduce", reached)
    return taken


def test_checksums_of_offloaded_parameters(two_ranks: torch.device) -> None:
    with pytest.raises(Reached, match=str(two_ranks)):
        ReplicaCheck(nn.Linear(2, 2))()


def test_what_ranks_have_gradients_of(two_ranks: torch.device) -> None:
    average = GradientAverage(Ranks(0, 2, 1.0, averages=False), is_wanted=True)
    with pytest.raises(Reached, match=str(two_ranks)):
        average.of({"weight": torch.ones(2)})
