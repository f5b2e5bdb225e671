"""What is logged into a run when the monitor has no step open is added to what is known already."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import tmm
from tmm.core.failures import Gaps
from tmm.runs.delivery import Value
from tmm.runs.instrument import steps_of

KEY = "activation/[root module]/mean"


def too_large(values: torch.Tensor) -> torch.Tensor:
    if values.abs().sum() > 100:
        raise OverflowError("too large")
    return values.mean()


SPEC = tmm.Spec(tmm.activation(mean=lambda x: x, aggregate=too_large))


class Recorded:
    """A run, its model's monitor, and what a sink was told last of each step."""

    def __init__(self, root: Path) -> None:
        self.told: dict[int, dict[str, Value]] = {}
        self.run = tmm.start_run("p", root=root, system_seconds=None, sinks=[self.tell])
        self.model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.model.weight)
        tmm.instrument(self.model, SPEC, run=self.run)
        self.monitor, self.steps = tmm.monitor(self.model), steps_of(self.model)

    def tell(self, step: int, values: Mapping[str, Value]) -> None:
        self.told[step] = dict(values)

    def step(self, number: int, value: float, **logged: float) -> None:
        with self.monitor.step(number):
            self.model(torch.full((1, 1), value))
            self.run.log(logged)

    def check(self, expected: dict[int, dict[str, float]]) -> None:
        """What the run holds, and what the sink was told."""
        self.run.finish()
        with tmm.open_run(self.run.path) as run:
            for found in ({int(step): run.at(int(step)) for step in run.steps}, self.told):
                own = {
                    step: {key: value for key, value in values.items() if "system/" not in key}
                    for step, values in found.items()
                }
                assert own == expected


@pytest.fixture
def recorded(tmp_path: Path) -> Recorded:
    return Recorded(tmp_path)


def test_values_are_added_to_the_whole_step(recorded: Recorded) -> None:
    recorded.step(0, 2.0, loss=1.0)
    recorded.run.log({"validation": 3.0})
    recorded.step(1, 4.0)
    recorded.run.log({"validation": 5.0, "loss": 6.0})
    recorded.check(
        {
            0: {KEY: 2.0, "loss": 1.0, "validation": 3.0},
            1: {KEY: 4.0, "loss": 6.0, "validation": 5.0},
        }
    )


def test_values_are_added_again_after_a_step_that_was_discarded(recorded: Recorded) -> None:
    recorded.run.log({"early": 1.0})
    recorded.monitor.begin_step(0)
    recorded.run.log({"forgotten": 1.0})
    recorded.steps.discard_step()
    recorded.step(0, 2.0)
    recorded.run.log({"validation": 3.0})
    recorded.monitor.begin_step(1)
    recorded.steps.discard_step()
    recorded.run.log({"accuracy": 4.0})
    recorded.step(1, 5.0)
    recorded.check({0: {KEY: 2.0, "early": 1.0, "validation": 3.0, "accuracy": 4.0}, 1: {KEY: 5.0}})


def interrupted(recorded: Recorded) -> None:
    with pytest.raises(KeyError), recorded.monitor.step(0):
        recorded.model(torch.ones(1, 1))
        recorded.run.log({"loss": 2.0})
        raise KeyError


def not_ended(recorded: Recorded) -> None:
    recorded.monitor.begin_step(0)
    recorded.run.log({"loss": 2.0})


def too_large_to_record(recorded: Recorded) -> None:
    with pytest.warns(tmm.MonitoringWarning, match="monitoring failed on step 0.*too large"):
        recorded.step(0, 1000.0, loss=2.0)


@pytest.mark.parametrize("drop", [interrupted, not_ended, too_large_to_record])
def test_a_step_that_is_dropped_when_it_comes_again_leaves_the_earlier_record(
    recorded: Recorded, drop: Callable[[Recorded], None]
) -> None:
    recorded.step(0, 3.0, loss=1.0, other=1.0)
    drop(recorded)
    expected = {0: {KEY: 3.0, "loss": 2.0, "other": 1.0}}
    if drop is not not_ended:
        recorded.run.log({"validation": 4.0})
        expected[0]["validation"] = 4.0
    recorded.check(expected)


def test_values_after_a_step_that_could_not_be_evaluated_end_no_training(
    recorded: Recorded,
) -> None:
    recorded.step(0, 1.0)
    with pytest.warns(tmm.MonitoringWarning, match="monitoring failed on step 1.*too large"):
        recorded.step(1, 1000.0, loss=2.0)
    recorded.run.log({"validation": 3.0})
    recorded.step(2, 4.0)
    recorded.check({0: {KEY: 1.0}, 1: {"loss": 2.0, "validation": 3.0}, 2: {KEY: 4.0}})


def test_values_after_a_first_step_that_could_not_be_evaluated(recorded: Recorded) -> None:
    with pytest.raises(ValueError, match="too large"):
        recorded.step(0, 1000.0, loss=1.0)
    recorded.run.log({"validation": 2.0})
    recorded.check({0: {"loss": 1.0, "validation": 2.0}})


def test_steps_go_on_when_the_model_is_gone(recorded: Recorded) -> None:
    """What is logged after ``run.step()`` belongs to the next step, not to the model's last one."""
    recorded.step(0, 2.0)
    recorded.run.log({"late": 1.0})
    tmm.remove(recorded.model)
    recorded.run.log({"later": 2.0})
    recorded.run.step()
    recorded.run.log({"loss": 3.0})
    recorded.run.step()
    recorded.run.log({"loss": 4.0})
    recorded.check({0: {KEY: 2.0, "late": 1.0, "later": 2.0}, 1: {"loss": 3.0}, 2: {"loss": 4.0}})


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed"),
    ],
)
def test_a_failed_collective_is_not_said_to_end_no_training(error: Exception) -> None:
    gaps = Gaps("raise")
    with pytest.warns(tmm.MonitoringWarning, match="did not reach one another") as caught:
        gaps.add_failure(3, error)
    assert not any("the training goes on" in str(item.message) for item in caught)
    gaps.close()
    with pytest.warns(tmm.MonitoringWarning, match="step 4.*; the training goes on. ValueError"):
        gaps.add_failure(4, ValueError("too large"))
