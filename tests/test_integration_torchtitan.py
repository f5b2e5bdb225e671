"""The metrics processor for torchtitan, in a trainer that calls it as torchtitan's does."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests import torchtitan_parts
from tests.torchtitan_parts import KeepingLogger, Trainer, TrainerConfig

SPEC = tmm.Spec(
    tmm.activation("rms"), tmm.gradient("norm"), tmm.optimizer_state("exp_avg_norm"), every=2
)


def spec_of_the_test() -> tmm.Spec:
    return SPEC


@pytest.fixture
def titan() -> Iterator[Any]:
    with torchtitan_parts.installed():
        yield importlib.import_module("tmm.integrations.torchtitan")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.last(torch.relu(self.first(x)))
        return result


def model() -> Net:
    torch.manual_seed(0)
    net = Net()
    net.compile(backend="aot_eager")
    return net


def trainer(titan: Any, folder: Path, *, log_freq: int = 2, **section: Any) -> Trainer:
    section = {"spec": f"{__name__}:SPEC", **section}
    config = titan.TMMMetricsProcessor.Config(
        log_freq=log_freq, enable_tensorboard=True, tmm=titan.TMMConfig(**section)
    )
    return Trainer(TrainerConfig(config, str(folder)), model())


def plain(folder: Path, steps: int = 4) -> Trainer:
    """Without tmm."""
    config = torchtitan_parts.MetricsProcessor.Config(log_freq=2)
    trained = Trainer(TrainerConfig(config, str(folder), steps=steps), model())
    trained.train()
    trained.close()
    return trained


def loggers_of(trained: Trainer) -> list[KeepingLogger]:
    found = trained.metrics_processor.logger._loggers
    return [logger for logger in found if isinstance(logger, KeepingLogger)]


def test_a_training_is_recorded_and_not_disturbed(titan: Any, tmp_path: Path) -> None:
    trained = trainer(titan, tmp_path, name="first")
    trained.train()
    path = trained.metrics_processor.run.path
    trained.close()
    (record,) = tmm.list_runs(tmp_path / "tmm")
    assert (record.project, record.name, record.status) == ("torchtitan", "first", "finished")
    assert record.path == path
    assert record.config["training"] == {"steps": 4}
    with tmm.open_run(path) as run:
        assert run.series("activation/first/rms")[0].tolist() == [2, 4]
        assert run.series("gradient/first.weight/norm")[0].tolist() == [2, 4]
        assert run.series("optimizer_state/first.weight/exp_avg_norm")[0].tolist() == [2, 4]
        for key in ("loss", "loss_metrics/global_avg_loss", "grad_norm", "throughput(tps)", "lr"):
            assert run.series(key)[0].tolist() == [1, 2, 4]
        assert run.series("validation_metrics/loss")[0].tolist() == [2]
        _, norms = run.series("gradient/first.weight/norm")
    alone = plain(tmp_path)
    for own, other in zip(
        trained.model_parts[0].parameters(), alone.model_parts[0].parameters(), strict=True
    ):
        assert torch.equal(own, other)
    # Both micro-batches, of the last step.
    net = alone.model_parts[0]
    assert isinstance(net, Net)
    gradient = net.first.weight.grad
    assert gradient is not None
    assert norms[-1] == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_values_go_to_the_loggers_of_torchtitan(titan: Any, tmp_path: Path) -> None:
    trained = trainer(titan, tmp_path, to_loggers=True)
    trained.train()
    path = trained.metrics_processor.run.path
    trained.close()
    (logger,) = loggers_of(trained)
    assert logger.is_closed
    with tmm.open_run(path) as run:
        for step, value in zip(*run.series("activation/first/rms"), strict=True):
            assert logger.steps[step]["activation/first/rms"] == pytest.approx(value)
    assert "activation/first/rms" not in logger.steps[1]
    quiet = trainer(titan, tmp_path / "quiet")
    quiet.train()
    quiet.close()
    assert not any("/rms" in key for step in loggers_of(quiet)[0].steps.values() for key in step)


def test_it_goes_on_after_a_checkpoint(titan: Any, tmp_path: Path) -> None:
    first = trainer(titan, tmp_path)
    first.config.steps = 3
    first.train()
    first.close()
    second = trainer(titan, tmp_path)
    second.train(loaded_step=2)
    second.close()
    (record,) = tmm.list_runs(tmp_path / "tmm")
    with tmm.open_run(record.path) as run:
        assert run.series("loss")[0].tolist() == [1, 2, 4]
        assert run.series("activation/first/rms")[0].tolist() == [2, 4]
    third = trainer(titan, tmp_path)  # from the beginning: another run
    third.train()
    third.close()
    assert len(tmm.list_runs(tmp_path / "tmm")) == 2


def test_a_training_that_fails(titan: Any, tmp_path: Path) -> None:
    trained = trainer(titan, tmp_path)
    trained.batch = lambda place: torch.ones(3, 7)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError):
        try:
            trained.train()
        except Exception:
            trained.close()
            raise
    (record,) = tmm.list_runs(tmp_path / "tmm")
    assert record.status == "failed"


def test_it_can_be_left_out(titan: Any, tmp_path: Path) -> None:
    trained = trainer(titan, tmp_path, enable=False)
    trained.train()
    trained.close()
    assert not (tmp_path / "tmm").exists()
    assert loggers_of(trained)[0].steps.keys() == {1, 2, 4}


@pytest.mark.parametrize("spec", ["", f"{__name__}:spec_of_the_test"])
def test_what_is_measured(titan: Any, tmp_path: Path, spec: str) -> None:
    section = titan.TMMConfig(every=3, spec=spec)
    found = titan.spec_of(section)
    assert found.every == (2 if spec else 3)


def test_what_cannot_be(titan: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.tmm\.every=0 must be greater"):
        titan.TMMConfig(every=0)
    with pytest.raises(ValueError, match=r"metrics\.tmm\.spec='nowhere' is not"):
        titan.TMMConfig(spec="nowhere")
    trained = trainer(titan, tmp_path, spec=f"{__name__}:model")
    with pytest.raises(ValueError, match="and no tmm.Spec, nor a function"):
        trained.train()
    trained = trainer(titan, tmp_path)
    trained.metrics_processor.parallel_dims.pp_enabled = True
    with pytest.raises(ValueError, match="pipeline parallelism is not supported"):
        trained.train()
    trained = trainer(titan, tmp_path)
    trained.metrics_processor.device_memory_monitor.device = torch.device("cuda")
    trained.config.job["training"]["disable_cuda_graphs"] = False
    with pytest.raises(ValueError, match=r"set --training\.disable_cuda_graphs"):
        trained.train()


def test_without_torchtitan() -> None:
    sys.modules.pop("tmm.integrations.torchtitan", None)
    with pytest.raises(ImportError, match="needs torchtitan"):
        importlib.import_module("tmm.integrations.torchtitan")
