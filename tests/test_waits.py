"""The training waits for no device: counted on one that is mocked."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

import tmm
from tests.mocked_device import Device, mocked_device, to_device
from tmm.instrumentation.reference.inputs import ReferenceInputs
from tmm.runs.instrument import steps_of

EVERYTHING = tmm.Spec(
    *tmm.default_spec().rules,
    tmm.activation("rms", l2=lambda x: x.norm(dim=-1)),
    tmm.gradient("norm", "rms", parameters="0.*"),
    tmm.gradient(l2=lambda x: x.norm()),  # whose squares are known of some already
    tmm.parameter("rms", mine=lambda x: x.abs().mean()),
    tmm.update("relative_norm", "rms"),
    tmm.optimizer_state("exp_avg_norm", "effective_lr"),
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    with mocked_device(monkeypatch) as device:
        yield device


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> torch.Tensor:
    """A forward pass, gradients (autograd has no queue for a mocked device), and a step."""
    parameter = next(model.parameters())
    loss = model(torch.full((2, 4), step + 1.0).to(parameter.device, non_blocking=True)).sum()
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 0.1 * (index + 1))
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def values(spec: tmm.Spec, where: str, steps: int) -> dict[int, dict[str, tmm.steps.archive.Value]]:
    model = to_device(network(), where)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tmm.instrument(model, spec)
    monitor = tmm.monitor(model)
    monitor.watch(optimizer)
    for step in range(steps):
        with monitor.step(step):
            monitor.log_scalar("loss", step_of(model, optimizer, step))
    found = monitor.get_all_metrics()
    tmm.remove(model)
    return found


def test_without_a_run_steps_are_read_as_the_device_comes_to_them(device: Device) -> None:
    """Pinned rows and events of a step live until the device has come to its end, not longer."""
    model = to_device(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tmm.instrument(model, tmm.Spec(tmm.activation("rms"), tmm.update("norm")))
    monitor = tmm.monitor(model)
    monitor.watch(optimizer)
    collectors = []
    for step in range(6):
        with monitor.step(step):
            step_of(model, optimizer, step)
        collectors.append(steps_of(model).archive.latest)
        if step == 3:
            device.run()
    assert [collector.holds_values for collector in collectors] == [False] * 4 + [True] * 2
    assert not device.waits
    assert device.events == 2 * 6  # of all of a step, and of a look at what was written later
    assert len(monitor.get_all_metrics()) == 6
    assert len(device.waits) == 1
    assert not any(collector.holds_values for collector in collectors)


def test_a_monitored_step_waits_for_nothing(device: Device) -> None:
    expected = values(EVERYTHING, "cpu", 3)
    assert not device.waits
    found = values(EVERYTHING, "cuda:0", 3)
    assert [wait for wait in device.waits if "an event" not in wait] == []
    assert len(device.waits) <= 3
    assert found.keys() == expected.keys()
    for step, own in expected.items():
        assert found[step].keys() == own.keys()
        for key, value in own.items():
            np.testing.assert_allclose(found[step][key], value, rtol=1e-5, err_msg=key)


def test_what_waits_is_counted(device: Device) -> None:
    """The list of ``torch.cuda.set_sync_debug_mode``, as far as it is met here."""
    x = torch.arange(6.0).to("cuda:0", non_blocking=True)
    mask = x > 2
    waiting = (
        lambda: x[0].item(),
        lambda: bool(mask.any()),
        lambda: x.cpu(),
        lambda: x[mask],
        lambda: x[[0, 2]],
        lambda: x[torch.tensor([0, 2])],
        lambda: x.nonzero(),
        lambda: x.masked_fill_(mask, 0)[mask],
        lambda: torch.equal(x, x),
        lambda: torch.arange(6.0).to("cuda:0"),
        lambda: torch.tensor([1.0], device="cuda:0"),
        lambda: torch.empty(6).copy_(x, non_blocking=True),  # which is not pinned
        lambda: x.copy_(torch.arange(6.0)),
    )
    for call in waiting:
        device.waits.clear()
        call()
        assert len(device.waits) == 1
    device.waits.clear()
    pinned = torch.empty(6, pin_memory=True)
    pinned.copy_(x, non_blocking=True)
    assert pinned.isnan().all()  # the device has not come to it
    device.run()
    assert pinned.equal(torch.arange(6.0))
    torch.where(mask, x, 0.0)
    assert not device.waits
    with pytest.raises(RuntimeError, match="one device"):
        x + torch.arange(6.0).to("cuda:1", non_blocking=True)
    with pytest.raises(RuntimeError, match="of the host"):
        x + torch.arange(6.0)


class Fused(torch.optim.SGD):
    """Its steps are handed a flag, as those of fused kernels by a scaler."""

    found_inf: torch.Tensor

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad, alpha=-0.01)


def test_a_skipped_step_may_be_known_on_another_device(device: Device) -> None:
    """A scaler keeps ``found_inf`` on the device of the loss, a fused step reads it from there."""
    model = to_device(network())
    optimizer = Fused(model.parameters(), lr=0.01)
    tmm.instrument(model, tmm.Spec(tmm.activation("rms"), tmm.gradient("norm")))
    monitor = tmm.monitor(model)
    monitor.watch(optimizer)
    for step, found in enumerate((0.0, 1.0)):
        optimizer.found_inf = torch.tensor(found).to("cuda:1", non_blocking=True)
        with monitor.step(step):
            step_of(model, optimizer, step)
    assert not device.waits
    first, second = monitor.get_all_metrics().values()
    assert first["step/gradient_norm"] == pytest.approx(1.0)
    assert second["step/gradient_norm"] == 0
    assert "gradient/0.weight/norm" in first
    assert "gradient/0.weight/norm" not in second


class Many(nn.Module):
    """64 parameters that are alike, and one that is larger than what is measured at a time."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.all = nn.ParameterList(torch.randn(32, 32, dtype=dtype) for _ in range(64))
        self.large = nn.Parameter(torch.randn(40, 64, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.large[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rule", [tmm.update("relative_norm", "rms", "kurtosis"), tmm.optimizer_state("effective_lr")]
)
def test_what_is_made_of_all_parameters_takes_little_memory(
    device: Device, monkeypatch: pytest.MonkeyPatch, rule: tmm.spec.rules.Rule, dtype: torch.dtype
) -> None:
    """Beyond the copy before the step: what is measured at a time, not as much as the model."""
    for place in ("tmm.kernels.summarize.differences._MOST", "tmm.runtime.tensor_copies._MOST"):
        monkeypatch.setattr(place, 2048)
    found = {}
    for where in ("cpu", "cuda:0"):
        model = to_device(Many(dtype), where)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        tmm.instrument(model, tmm.Spec(tmm.activation("rms"), rule))
        monitor = tmm.monitor(model)
        monitor.watch(optimizer)
        for step in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            with monitor.step(step):
                model(torch.ones(1).to(where, non_blocking=True))
                before = device.peak = device.allocated
                optimizer.step()
        if where != "cpu":
            copy = size if rule.subject == "parameters" and "relative_norm" in rule.metrics else 0
            assert device.peak - before - copy < 0.75 * size
        found[where] = monitor.get_all_metrics()
        tmm.remove(model)
    assert found["cpu"].keys() == found["cuda:0"].keys()
    for step, expected in found["cpu"].items():
        for key, value in expected.items():
            np.testing.assert_allclose(found["cuda:0"][step][key], value, rtol=1e-4, err_msg=key)


@pytest.mark.parametrize("failing", ["_begin", "_end"])
def test_a_device_without_memory_ends_no_training(
    device: Device, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Also not in the first step, in which other faults are raised."""

    def lacks(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate")

    model = to_device(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tmm.instrument(model, tmm.Spec(tmm.activation("rms"), tmm.update("norm")))
    monitor = tmm.monitor(model)
    monitor.watch(optimizer)
    with monkeypatch.context() as context:
        context.setattr(f"tmm.steps.watched_optimizer.WatchedOptimizer.{failing}", lacks)
        with (
            pytest.warns(tmm.MonitoringWarning, match="step 0.*tried to allocate"),
            monitor.step(0),
        ):
            step_of(model, optimizer, 0)
    with monitor.step(1):
        step_of(model, optimizer, 1)
    assert list(monitor.get_all_metrics()) == [1]


def test_reference_inputs_are_compared_without_waiting(device: Device) -> None:
    """On a device they are taken to differ; whether they did is known later."""
    own, same, other = (
        x.to("cuda:0", non_blocking=True) for x in (torch.ones(3), torch.ones(3), torch.zeros(3))
    )
    for given, remarks in ((own, 0), (same, 0), (other, 1)):
        inputs = ReferenceInputs()
        inputs.give((given,), {})
        inputs.match(nn.Linear(1, 1).forward, (own,), {})
        assert not device.waits
        assert len(inputs.pairs) == (given is not own)
        device.run()
        assert len(list(inputs.remarks())) == remarks
