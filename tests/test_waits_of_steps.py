"""Whole steps on a mocked device, with their backward passes: the training waits for nothing.

In a process of their own, as torch must be told of the device before it is imported.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tmm
from tests import device_hooks
from tests.interpreters import ROOT
from tests.mocked_device import Device, mocked_device, to_device

RULES = (
    *tmm.default_spec().rules,
    tmm.activation("rms", "histogram", l2=lambda x: x.norm(dim=-1)),
    tmm.activation_gradient("rms", "absmax"),
    tmm.gradient("norm", "rms"),
    tmm.parameter("rms"),
    tmm.update("relative_norm"),
    tmm.optimizer_state("exp_avg_norm", "effective_lr"),
)
Loop = Callable[..., dict[int, dict[str, Any]]]


@pytest.fixture(scope="module")
def faults() -> dict[str, str]:
    """What is wrong by each check, in a process where torch takes the machine for one with GPUs."""
    if not device_hooks.HAS_COMPILER:
        pytest.skip("no C++ compiler")
    code = (
        "from tests.device_hooks import load_hooks; load_hooks()\n"
        "from tests.test_waits_of_steps import print_faults; print_faults()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_faults() -> None:
    """Run all checks; an empty text for one that holds."""
    found = {}
    for check in (check_steps, check_alerts, check_threads):
        try:
            check()
            found[check.__name__] = ""
        except Exception:
            found[check.__name__] = traceback.format_exc()[-5000:]
    print(json.dumps(found))


@contextmanager
def a_device() -> Iterator[Device]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        with mocked_device(patch) as device:
            yield device


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))


def trained(
    where: str,
    *,
    rules: tuple[Any, ...] = RULES,
    is_monitored: bool = True,
    is_scaled: bool = False,
    is_clipped: bool = False,
    in_a_run: bool = False,
    alerts: bool = False,
    steps: int = 3,
    bad: int | None = None,
    after_step: Callable[[int], None] = lambda step: None,
) -> dict[int, dict[str, Any]]:
    """A training by hand, and what was measured; the loss of step ``bad`` is infinite."""
    model = to_device(network(), where)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(where.split(":")[0], init_scale=1024.0, enabled=is_scaled)
    spec = tmm.Spec(*rules, diagnosis=True, alerts=alerts)
    with tempfile.TemporaryDirectory() as folder:
        run = tmm.start_run("waits", root=folder, system_seconds=None) if in_a_run else None
        given = scaler if is_scaled else None
        if is_monitored and run is not None:
            run.watch(model, spec, optimizer=optimizer, scaler=given)
        elif is_monitored:
            tmm.instrument(model, spec)
            tmm.monitor(model).watch(optimizer, scaler=given)
        for step in range(steps):
            if is_monitored and run is None:
                tmm.monitor(model).begin_step(step)
            x = torch.full((2, 4), step + 1.0).to(where, non_blocking=True)
            loss = model(x * (float("inf") if step == bad else 1.0)).square().mean()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if is_clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if run is not None:
                run.log({"loss": loss, "learning_rate": 0.01})
                run.step()
            elif is_monitored:
                tmm.monitor(model).log_scalar("loss", loss.detach())
                tmm.monitor(model).end_step()
            after_step(step)
        if run is not None:
            run.finish()
            with tmm.open_run(run.path) as recorded:
                return {int(step): recorded.at(int(step)) for step in recorded.steps}
        if not is_monitored:
            return {}
        found = tmm.monitor(model).get_all_metrics()
        tmm.remove(model)
        return found


WAYS: dict[str, dict[str, bool]] = {
    "plain": {},
    "clipped": {"is_clipped": True},
    "scaled": {"is_scaled": True},
    "scaled and clipped": {"is_scaled": True, "is_clipped": True},
    "in a run": {"in_a_run": True, "is_clipped": True},
    "in a run, scaled": {"in_a_run": True, "is_scaled": True},
    "with alerts": {"alerts": True, "is_scaled": True},
    "in a run, with alerts": {"in_a_run": True, "alerts": True},
}


def test_steps_wait_for_nothing(faults: dict[str, str]) -> None:
    assert not faults["check_steps"], faults["check_steps"]


def check_steps() -> None:
    """Nothing besides what waits in the same training without tmm, such as a scaler itself."""
    for name, way in WAYS.items():
        expected = trained("cpu", **way)
        with a_device() as device:
            trained("cuda:0", **{**way, "in_a_run": False}, is_monitored=False)
            own = len(device.waits)
            assert own == (3 if way.get("is_scaled") else 0), (name, device.waits)
            device.waits.clear()
            during: list[int] = []
            note = lambda step: during.append(len(device.waits))  # noqa: B023, E731
            found = trained("cuda:0", **way, after_step=note)
            assert during == [own * (step + 1) // 3 for step in range(3)], (name, device.waits)
        assert found.keys() == expected.keys() == {0, 1, 2}, name
        for step, values in expected.items():
            values = {key: value for key, value in values.items() if not key.startswith("time/")}
            assert found[step].keys() >= values.keys(), name
            assert any(key.startswith("activation_gradient/") for key in values)
            for key, value in values.items():
                if key.split("/")[0] in ("throughput", "system"):
                    continue
                error = f"{name}: {key} of step {step}"
                np.testing.assert_allclose(
                    found[step][key], value, rtol=1e-4, atol=1e-7, err_msg=error
                )


def test_alerts_look_at_a_step_when_the_next_one_is_under_way(faults: dict[str, str]) -> None:
    assert not faults["check_alerts"], faults["check_alerts"]


def check_alerts() -> None:
    """The device comes to the end of a step while the next one runs: nobody has waited by then."""
    told: dict[int, list[str]] = {}
    with a_device() as device, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        def after_step(step: int) -> None:
            alerts = [w for w in caught if issubclass(w.category, tmm.AlertWarning)]
            told[step] = [str(w.message) for w in alerts]
            device.run()

        trained("cuda:0", alerts=True, steps=5, bad=2, after_step=after_step)
        assert [wait for wait in device.waits if "an event" not in wait] == []
    assert not any(told[step] for step in (0, 1, 2))
    assert any("step 2" in text for text in told[3]), told


def test_threads_sleep_on_the_device_that_they_wait_for(faults: dict[str, str]) -> None:
    assert not faults["check_threads"], faults["check_threads"]


def check_threads() -> None:
    """On the second one, which is not the current one of any thread."""
    with a_device() as device:
        trained("cuda:1", in_a_run=True)
        assert device.events
        assert device.busy == 0
        assert device.elsewhere
        threads = {name for name, _, _ in device.asked}
        assert any(name.startswith("tmm") for name in threads), threads
        assert all(of == current for _, of, current in device.asked), device.asked
