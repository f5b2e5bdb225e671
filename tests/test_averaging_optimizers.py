"""Optimizers that average gradients over ranks in their own step, and metrics of what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tmm
from tests.averaging_optimizers import Both, PartedAdam, net, spec, train
from tests.interpreters import Interpreters
from tests.test_distributed import launch, result

MODULE = "tests.averaging_optimizers"
NAMES = [name for name, _ in net().named_parameters()]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    folder = tmp_path_factory.mktemp("two")
    done = launch(interpreters, 2, folder, ("adam", "both", "of_other_parameters"), MODULE)
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


def of(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = result(folder, name)[0]
    return found


def check_averaged(found: dict[str, Any], make: Any, ranks: int) -> None:
    """Names and values of one process with the whole batch."""
    expected, _ = train(spec(), make, count=ranks)
    metrics, more = found["averaged"]
    for step, values in expected.items():
        assert {k for k in values if not k.startswith("optimizer_state")} == {
            k for k in metrics[step] if not k.startswith("optimizer_state")
        }
        for key in metrics[step].keys() & values.keys():  # states of stacks are known to some
            np.testing.assert_allclose(
                metrics[step][key], values[key], rtol=1e-5, atol=2e-7, err_msg=f"{step} {key}"
            )
    assert more["notes"] == {
        "gradient": "the averages over ranks of what each has when it is measured"
        " (average_gradients=True)"
    }


@pytest.mark.parametrize(("name", "make"), [("adam", PartedAdam), ("both", Both)])
def test_the_average_is_that_of_the_whole_batch(two: Path, name: str, make: Any) -> None:
    check_averaged(of(two, name), make, 2)


@pytest.mark.parametrize(("name", "make"), [("adam", PartedAdam), ("both", Both)])
def test_without_it_names_say_whose_gradients_they_are(two: Path, name: str, make: Any) -> None:
    found = of(two, name)
    metrics, more = found["plain"]
    expected, _ = train(spec(), make, count=2)
    for parameter in NAMES:
        key = f"gradient/{parameter}[rank 0]/norm"
        assert metrics[0][key] == pytest.approx(more["local"][parameter], rel=1e-5)
        assert f"gradient/{parameter}/norm" not in metrics[0]
    norm = np.linalg.norm(list(more["local"].values()))
    assert metrics[0]["step/gradient_norm[rank 0]"] == pytest.approx(norm, rel=1e-5)
    assert "step/gradient_norm" not in metrics[0]
    for step, values in expected.items():  # what the optimizer has done is of all ranks
        for key, value in values.items():
            if key.startswith(("update", "parameter")):
                np.testing.assert_allclose(metrics[step][key], value, rtol=1e-5, atol=2e-7)


def test_states_in_parts_are_joined_and_those_of_several_left_out(two: Path) -> None:
    expected, _ = train(spec(), PartedAdam, count=2)
    metrics, _ = of(two, "adam")["plain"]
    keys = [key for key in expected[3] if key.startswith("optimizer_state")]
    assert len(keys) == len(NAMES)
    for key in keys:
        np.testing.assert_allclose(metrics[3][key], expected[3][key], rtol=1e-5)
    metrics, more = of(two, "both")["plain"]
    assert "optimizer_state/0.weight/exp_avg_norm" not in metrics[3]
    assert "of several parameters" in more["unmeasured"]["optimizer_state of 0.weight"]


@pytest.mark.parametrize("name", ["adam", "both"])
def test_the_training_is_as_without(two: Path, name: str) -> None:
    found = of(two, name)
    plain = found["without"]["final"]
    for way in ("plain", "averaged"):
        other = found[way][1]["final"]
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_ranks_with_gradients_of_other_parameters_are_told_so(two: Path) -> None:
    assert "ranks have gradients of different parameters" in of(two, "of_other_parameters")["error"]


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, interpreters: Interpreters) -> None:
    done = launch(interpreters, 4, tmp_path, ("adam", "both"), MODULE)
    assert done.returncode == 0, done.stderr[-8000:]
    for name, make in (("adam", PartedAdam), ("both", Both)):
        found = of(tmp_path, name)
        check_averaged(found, make, 4)
        test_the_training_is_as_without(tmp_path, name)


# Alignment


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-5, 1e-2, 10.0])
def test_alignment(dtype: torch.dtype, size: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(30, 20).to(dtype)
    called = tmm.instrument(model, tmm.Spec(tmm.update("alignment", "norm")))
    optimizer = torch.optim.SGD(model.parameters(), lr=size)
    monitor = tmm.monitor(called)
    monitor.watch(optimizer)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    with monitor.step(0):
        called(torch.randn(4, 30, dtype=dtype)).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        change = parameter.detach().double() - before[name]
        expected = torch.nn.functional.cosine_similarity(
            change.flatten(), before[name].flatten(), dim=0, eps=0
        ).item()
        found = monitor.get_step_metrics()[f"update/{name}/alignment"]
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)
    tmm.remove(called)


def test_decay_alone_points_back() -> None:
    model = nn.Linear(4, 4, bias=False)
    called = tmm.instrument(model, tmm.Spec(tmm.update("alignment")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    monitor = tmm.monitor(called)
    monitor.watch(optimizer)
    with monitor.step(0):
        (called(torch.ones(1, 4)).sum() * 0).backward()
        optimizer.step()
    assert monitor.get_step_metrics()["update/weight/alignment"] == pytest.approx(-1.0)
    tmm.remove(called)


def test_only_updates_have_it() -> None:
    with pytest.raises(ValueError, match="alignment"):
        tmm.activation("alignment")
    with pytest.raises(ValueError, match="alignment"):
        tmm.parameter_difference("alignment")
