"""References of sharded models, against the same comparison on one process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tmm
from tests.interpreters import Interpreters
from tests.rank_trainings import Metrics
from tests.sharded_reference_trainings import alone, net, other_state, rules
from tests.test_distributed import launch, result

MODULE = "tests.sharded_reference_trainings"
OF_TWO = (
    *("ddp", "compiled", "uncompiled", "stays_gathered", "saved", "undisturbed", "counted"),
    *("mixed_precision", "tensor_parallel", "set_later"),
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    """What two ranks have measured in each training."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(interpreters, 2, folder, OF_TWO, MODULE)
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


@pytest.fixture(scope="module")
def from_init() -> Metrics:
    return alone(2)


@pytest.fixture(scope="module")
def from_other() -> Metrics:
    return alone(2, other_state())


def check(found: Mapping[Any, Any], expected: Metrics, least: int = 60) -> None:
    """All keys and values are equal; those that are zero at first exactly."""
    assert found.keys() - {-1} == expected.keys()
    for step, values in expected.items():
        assert set(found[step]) == set(values)
        assert len(values) >= least
        for key, value in values.items():
            if "difference" in key and value == 0.0:
                assert found[step][key] == 0.0, key
            # A norm of differences of outputs is known to a part of the outputs' own size.
            of_outputs = values.get(f"activation/{key.split('/')[1]}/rms", 1.0)
            noise = 2e-7 * of_outputs if key.startswith(("RCC", "activation_d")) else 1e-9
            np.testing.assert_allclose(
                found[step][key], value, rtol=1e-5, atol=noise, err_msg=f"{step} {key}"
            )


@pytest.mark.parametrize("name", ["compiled", "uncompiled", "stays_gathered"])
def test_equals_one_process(two: Path, from_init: Metrics, name: str) -> None:
    found = result(two, name)
    check(found, from_init)
    differences = [v for k, v in found[3].items() if k.startswith("activation_difference")]
    assert max(differences) > 0.1  # there is something to see


def test_distributed_data_parallel_agrees(two: Path, from_init: Metrics) -> None:
    check(result(two, "ddp"), from_init)


@pytest.mark.parametrize(
    "source", ["state dict", "state dict of parts", "module", "file", "checkpoint"]
)
def test_every_source(two: Path, from_other: Metrics, source: str) -> None:
    check(result(two, "saved")[source], from_other)  # type: ignore[index]


def test_a_checkpoint_in_parts_is_read_by_one_process(two: Path, from_other: Metrics) -> None:
    check(alone(2, two / "parts-2"), from_other)


def test_no_more_is_gathered_than_the_model_gathers(two: Path) -> None:
    for name in ("compiled", "uncompiled"):
        counts = result(two, name)[-1]["counts"]
        assert 0 < counts["most"] <= 5  # parameters of a block


def test_the_training_is_as_without(two: Path) -> None:
    plain, *others = result(two, "undisturbed")[0].values()
    for other in others:
        assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_steps_in_between_take_no_collective(two: Path) -> None:
    counts = result(two, "counted")[0]
    plain, measured = counts["plain"], counts["measured"]
    assert measured[1] == plain[1]
    assert measured[3] == plain[3]
    assert measured[2] > plain[2]


def test_mixed_precision(two: Path) -> None:
    found = result(two, "mixed_precision")
    assert found[0]["activation_difference/blocks.0/relative_norm"] == 0.0
    assert found[3]["activation_difference/blocks.0/relative_norm"] > 0.01
    assert "RCC (W_t-W_0)x_t/blocks.0.up/l2norm" in found[3]
    assert "RCC (W_t-W_0)x_t/blocks.0/l2norm" not in found[3]
    assert "its hooks convert what it is given" in found[-1]["text"]


def test_tensor_parallel(two: Path) -> None:
    found = result(two, "tensor_parallel")[0]
    chosen = (tmm.parameter_difference("relative_norm", "norm", "absmax"),)
    for name, source in (("init", "init"), ("other", other_state())):
        expected = plain_differences(source, chosen)
        check(found[name], expected, least=20)


def plain_differences(source: Any, chosen: tuple[tmm.Rule, ...]) -> Metrics:
    from tests.sharded_reference_trainings import spec, train

    metrics, _, called = train(net(), spec(source, *chosen), lambda batch: [batch])
    tmm.remove(called)
    return metrics


def test_a_reference_that_is_set_while_parameters_are_gathered(two: Path) -> None:
    found = result(two, "set_later")
    same = {k: v for k, v in found[0].items() if k.startswith(("activation_d", "parameter_d"))}
    assert same
    of_zeros = {f"parameter_difference/blocks.{i}.norm.bias/relative_norm" for i in range(2)}
    assert all(v == 0.0 for k, v in same.items() if not k.endswith("cosine") and k not in of_zeros)
    assert found[1]["parameter_difference/first.weight/relative_norm"] > 0.5


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, interpreters: Interpreters) -> None:
    names = ("compiled", "hybrid", "saved")
    done = launch(interpreters, 4, tmp_path, names, MODULE)
    assert done.returncode == 0, done.stderr[-8000:]
    for name in ("compiled", "hybrid"):
        check(result(tmp_path, name), alone(4))
    expected = alone(4, other_state())
    for found in result(tmp_path, "saved").values():
        check(found, expected)
    check(alone(4, tmp_path / "parts-4"), expected)


# Checkpoints


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reference=.*is a folder without \.metadata"):
        tmm.instrument(net(), tmm.Spec(*rules(), reference=tmp_path))


@pytest.mark.parametrize("layout", ["top", "model", "deep", "wrapped"])
def test_where_a_checkpoint_keeps_the_model(tmp_path: Path, layout: str) -> None:
    from torch.distributed import checkpoint

    state: Any = other_state()
    held = {
        "top": state,
        "model": {"model": state, "ema": state},
        "deep": {"a": {"b": state}},
        "wrapped": {"net": {f"_orig_mod.{name}": tensor for name, tensor in state.items()}},
    }[layout]
    checkpoint.save(held, checkpoint_id=tmp_path / "c", no_dist=True)
    model = net()
    chosen = tmm.parameter_difference("norm")
    called = tmm.instrument(model, tmm.Spec(chosen, reference=tmp_path / "c"))
    with tmm.monitor(called).step(0):
        called(torch.randn(2, 8)).sum().backward()
        tmm.monitor(called).monitor_parameters()
    found = tmm.monitor(called).get_step_metrics()
    for name, parameter in net().named_parameters():
        expected = (parameter - state[name]).norm().item()
        assert found[f"parameter_difference/{name}/norm"] == pytest.approx(expected, rel=1e-5)


def test_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    from torch.distributed import checkpoint

    state = other_state()
    smaller = {**state, "first.weight": torch.ones(3, 8)}
    del smaller["first.bias"]
    checkpoint.save({"model": smaller}, checkpoint_id=tmp_path / "smaller", no_dist=True)
    with pytest.raises(ValueError, match=r"first\.weight has shape \(3, 8\), not \(10, 8\).*") as e:
        tmm.instrument(net(), tmm.Spec(*rules(), reference=tmp_path / "smaller"))
    assert "first.bias is missing" in str(e.value)
    checkpoint.save({"a": state, "b": state}, checkpoint_id=tmp_path / "two", no_dist=True)
    with pytest.raises(ValueError, match=r"several times, below 'a\.', 'b\.'"):
        tmm.instrument(net(), tmm.Spec(*rules(), reference=tmp_path / "two"))
    checkpoint.save({"x": torch.ones(2)}, checkpoint_id=tmp_path / "none", no_dist=True)
    with pytest.raises(ValueError, match="under no name; it holds such as x"):
        tmm.instrument(net(), tmm.Spec(*rules(), reference=tmp_path / "none"))
