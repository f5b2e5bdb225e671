"""Trainings on several processes against the same training on one, with the whole batch."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tmm
from tests import rank_trainings
from tests.interpreters import ROOT, Interpreters
from tests.rank_trainings import BATCH, Metrics, alone, evenly, spec, unevenly

EVEN = ("ddp_inside", "ddp_outside", "ddp_uncompiled", "distributed_states", "averaged_inside")
OTHERS = ("explained", "ddp_uneven", "fsdp", "fsdp_uneven", "skipping", "counted", "disagreeing")
AVERAGED = ("averaged_in_the_step",)
RECORDING = ("recorded", "each_by_itself", "absent", "frozen")


AS_A_MODULE = """
import runpy, sys, torch
torch.set_num_threads(1)
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def launch(
    interpreters: Interpreters,
    ranks: int,
    folder: Path,
    names: Iterable[str],
    trainings: str = "tests.rank_trainings",
) -> subprocess.CompletedProcess[str]:
    """Run these trainings as torchrun would."""
    return interpreters.run_ranks(
        ranks, AS_A_MODULE, trainings, folder, *names, folder=ROOT, timeout=400
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    """What two ranks have measured in each training."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(interpreters, 2, folder, (*EVEN, *OTHERS, *AVERAGED, *RECORDING))
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def result(folder: Path, name: str) -> Metrics:
    loaded: Metrics = torch.load(folder / f"{name}.pt", weights_only=False)
    return loaded


@pytest.fixture(scope="module")
def whole() -> Metrics:
    return alone(evenly, 2)


def check(found: Metrics, expected: Metrics, keys: Iterable[str] | None = None) -> None:
    """All keys and values are equal; updates and states to what their gradients' noise allows."""
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        wanted = set(values if keys is None else keys)
        assert set(found[step]) == wanted
        assert len(wanted) > 100
        for key in wanted:
            np.testing.assert_allclose(
                found[step][key], values[key], rtol=1e-5, atol=_noise(key, values), err_msg=key
            )


def _noise(key: str, values: dict[str, Any]) -> float:
    """Means about zero are known to a part of the size of what they are means of."""
    prefix, _, metric = key.rpartition("/")
    if metric == "histogram":
        return 2.0  # elements that lie on the edge of a bin
    if metric in ("mean", "kurtosis", "min", "max") or key == "hidden":
        return 1e-6 * float(values.get(f"{prefix}/rms", 1.0))
    if metric == "alignment":
        return 1e-6  # a mean of products about zero
    return 1e-9


@pytest.mark.parametrize("name", EVEN)
def test_data_parallel(two: Path, whole: Metrics, name: str) -> None:
    check(result(two, name), whole)


def test_data_parallel_with_other_batch_sizes(two: Path) -> None:
    check(result(two, "ddp_uneven"), alone(unevenly, 2))


def test_gradients_that_ranks_average_by_themselves(two: Path) -> None:
    """Where they are not equal on all ranks when they are measured, their keys say so."""
    inside, before, nowhere = result(two, "averaged_in_the_step").values()
    for found in (inside, before, nowhere):
        assert found["values"]["activation_gradient/1/norm"] == pytest.approx((8 / 64) ** 0.5)
        notes, is_alone = found["notes"], found is not before
        rank = "[rank 0]" if is_alone else ""
        key = f"gradient/0.weight{rank}/norm"
        assert notes["activation_gradient/1/norm"] == "of the mean of the ranks' losses"
        seen = found["mean"] if found is before else found["local"]
        assert found["values"][key] == pytest.approx(seen)
        for name in (key, f"step/gradient_norm{rank}", f"step/gradient_norm/0{rank}"):
            assert ("of this rank alone" in notes[name]) == is_alone
        assert ("gradient/0.weight" in found["explained"]) == is_alone
        assert ("    gradient/0.weight, gradient/1.weight" in found["text"]) == is_alone
        # All ranks have one and the same gradient of the bias.
        assert not notes["gradient/1.bias/norm"]
        assert not notes["update/1.bias/norm"]
        drifts = "[rank 0]" if found is nowhere else ""
        assert bool(notes[f"update/0.weight{drifts}/norm"]) == (found is nowhere)
        names = {name.replace("[rank 0]", "") for name in notes}
        assert len(names) == len(notes)  # each once, under one of its names
    assert inside["values"]["update/0.weight/norm"] == pytest.approx(0.1 * inside["mean"])


def test_sharded(two: Path) -> None:
    check(result(two, "fsdp"), alone(evenly, 2, measured=spec()))
    check(result(two, "fsdp_uneven"), alone(unevenly, 2, measured=spec()))


def test_coverage_is_explained_as_on_one_process(two: Path) -> None:
    def covered(text: str) -> list[str]:
        # Sorted, for buckets list the gradients of a part before the outputs of the next.
        rules, _, rest = text.partition("compiled:")
        sites = rest.partition("sites, in the order of execution:")[2].partition("---")[0]
        assert "activation/block.2: " in sites
        return sorted((rules + sites).splitlines())

    alone = rank_trainings.explained(lambda net: torch.compile(net, backend="aot_eager"))
    assert covered(result(two, "explained")[0]["text"]) == covered(alone[0]["text"])


def test_ranks_that_skip_and_end_earlier(two: Path) -> None:
    found = result(two, "skipping")
    net = rank_trainings.model()
    for step, batch in enumerate(rank_trainings.batches()):
        part = batch[:6] if step in (2, 4) else batch
        expected = net.first(part).square().mean().sqrt().item()
        assert found[step]["activation/first/rms"] == pytest.approx(expected, rel=1e-5)


def test_collectives_of_a_step(two: Path) -> None:
    found = result(two, "counted")
    assert found[1] == found[3] == {}
    # A reduction over two ranks is a message from each.
    assert found[2] == found[4] == {"maximum": 1, "total": 2, "isend": 3, "gather": 1}
    # Rank 0 names its rows, which are also those of parameters, and the others have the same ones.
    agreed = {"maximum": 2, "total": 2, "isend": 4, "gather": 1, "all_gather": 1, "broadcast": 2}
    assert found[0] == agreed


def test_ranks_that_measure_different_things_are_told_so(two: Path) -> None:
    (found,) = result(two, "disagreeing").values()
    assert found["measured"] == {}
    (text,) = (text for text in found["warnings"] if "rank 1 measures" in text)
    assert "rank 1 measures 'activation/last' as mean (joined), and other ranks as rms" in text


def test_only_rank_0_records(two: Path) -> None:
    (record,) = (record for record in tmm.list_runs(two) if record.project == "ranks")
    assert record.status == "finished"
    with tmm.open_run(record.path) as run:
        assert run.steps.tolist() == [0, 1, 2, 3, 4]
        assert set(run.series("rank")[1]) == {0.0}
        assert run.samples(0)["text"] == "of rank 0"
        expected = alone(evenly, 2, measured=spec())
        steps, norms = run.series("activation/block.2/norm")
        assert steps.tolist() == [0, 2, 4]
        wanted = [expected[step]["activation/block.2/norm"] for step in (0, 2, 4)]
        np.testing.assert_allclose(norms, wanted, rtol=1e-5)


def test_every_rank_may_record_by_itself(two: Path) -> None:
    first, second = (tmm.open_run(two / "each", rank=rank) for rank in (0, 1))
    key = "activation/first/norm"
    net, batch = rank_trainings.model(), rank_trainings.batches()[0]
    for run, part in ((first, batch[:6]), (second, batch[6:])):
        with run:
            assert run.at(0)[key] == pytest.approx(net.first(part).norm().item(), rel=1e-5)


def test_a_rank_that_opens_no_step_stops_nobody(two: Path) -> None:
    (found,) = result(two, "absent").values()
    assert found["seconds"] < 60
    (text,) = (text for text in found["warnings"] if "behind" in text)
    assert "32 monitored steps behind: such steps are recorded with the rows of this rank" in text
    (record,) = (record for record in tmm.list_runs(two) if record.project == "absent")
    with tmm.open_run(record.path) as run:
        assert run.steps.tolist() == list(range(70))
        expected = rank_trainings.model().first(rank_trainings.batches()[0]).square().mean().sqrt()
        values = run.series("activation/first/rms")[1]
        np.testing.assert_allclose(values, expected.item(), rtol=1e-5)
        partial = [event.step for event in run.events if event.kind == "partial"]
        assert partial == list(range(70 - 32))


def test_a_frozen_rank_is_waited_for_as_long_as_the_training_would(two: Path) -> None:
    (found,) = result(two, "frozen").values()
    assert 2 < found["seconds"] < 30
    with tmm.open_run(two / "frozen") as run:
        batch, net = rank_trainings.batches()[0], rank_trainings.model()
        for step, part in enumerate((batch, batch[: BATCH // 2])):
            expected = net.first(part).square().mean().sqrt().item()
            assert run.at(step)["activation/first/rms"] == pytest.approx(expected, rel=1e-5)
        (event,) = (event for event in run.events if event.kind == "partial")
        assert event.step == 1
        assert event.text.startswith("the rows of this rank alone: ")


def test_a_rank_that_dies_leaves_a_readable_run(tmp_path: Path, interpreters: Interpreters) -> None:
    begun = time.monotonic()
    done = launch(interpreters, 2, tmp_path, ["killed"])
    assert done.returncode != 0
    assert time.monotonic() - begun < 180
    (record,) = tmm.list_runs(tmp_path)
    assert record.status in ("crashed", "failed")
    with tmm.open_run(record.path) as run:
        assert run.series("loss")[1].tolist()[:2] == [0.0, 1.0]
        assert "activation/first/rms" in run.at(0)


@pytest.mark.slow
def test_four_ranks(tmp_path: Path, interpreters: Interpreters) -> None:
    done = launch(interpreters, 4, tmp_path, ["ddp_inside", "ddp_uneven", "fsdp", "hybrid"])
    assert done.returncode == 0, done.stderr[-5000:]
    check(result(tmp_path, "ddp_inside"), alone(evenly, 4))
    check(result(tmp_path, "ddp_uneven"), alone(unevenly, 4))
    for name in ("fsdp", "hybrid"):
        check(result(tmp_path, name), alone(evenly, 4, measured=spec()))
