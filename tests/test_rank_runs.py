"""Runs into which each rank records its own rows, read and shown side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tmm
from tests.interpreters import Interpreters
from tests.test_distributed import launch, result
from tmm.analysis import RecordedSeries, ranks_apart
from tmm.cli import app
from tmm.core.keys import key_of_rank
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runs.catalog import delete_run, find_run, list_runs
from tmm.runs.state import State
from tmm.runtime.store.run_writer import RunWriter

MODULE = "tests.rank_run_trainings"


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, interpreters: Interpreters) -> Path:
    folder = tmp_path_factory.mktemp("two")
    names = ("recorded", "taken", "resumed", "refused")
    done = launch(interpreters, 2, folder, names, MODULE)
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


def test_one_run_holds_the_rows_of_all_ranks(two: Path) -> None:
    measured = result(two, "recorded")[0]["measured"]
    files = sorted(name for name in os.listdir(two / "run") if name.endswith(".h5"))
    assert files == ["rank-0.metrics-001.h5", "rank-1.metrics-001.h5"]
    with tmm.open_run(two / "run") as run:
        assert run.ranks == [0, 1]
        assert run.steps.tolist() == [0, 2, 4]
        for rank, steps in enumerate(measured):
            for step, values in steps.items():
                found = run.at(step)
                for key, value in values.items():
                    info = KeyInfo(key, *_kind_and_site(key), 0, "")
                    np.testing.assert_allclose(found[key_of_rank(info, rank).key], value)
        assert run.is_histogram("activation/0[rank 1]/histogram")
        assert run.key_info("activation/0[rank 1]/rms").site == "0[rank 1]"
        losses = run.series("loss[rank 1]")[1]
        assert len(losses) == 3
        with pytest.raises(KeyError, match="no key 'loss'"):
            run.series("loss")
        keys = ["activation/0[rank 0]/rms", "loss[rank 1]", "activation/0[rank 1]/rms"]
        steps, values, is_there = run.table(keys)
        assert is_there.sum(axis=1).tolist() == [3, 3, 3]
        for key, row, there in zip(keys, values, is_there, strict=True):
            np.testing.assert_array_equal(run.series(key)[0], steps[there])
            np.testing.assert_array_equal(run.series(key)[1], row[there])


def _kind_and_site(key: str) -> tuple[str, str]:
    parts = key.split("/")
    if len(parts) == 1:
        return key, key
    is_whole = parts[0] in ("step", "system")
    return parts[0], "/".join(parts[1:] if is_whole else parts[1:-1])


def test_one_rank_is_read_under_the_usual_keys(two: Path) -> None:
    measured = result(two, "recorded")[0]["measured"]
    for rank in (0, 1):
        with tmm.open_run(two / "run", rank=rank) as run:
            for step, values in measured[rank].items():
                found = run.at(step)
                assert values.keys() <= found.keys()
                for key, value in values.items():
                    np.testing.assert_allclose(found[key], value)
            assert run.series("loss")[0].tolist() == [0, 2, 4]
            assert len(run.series("system/step_seconds")[1]) == 2
    with pytest.raises(ValueError, match="rank=2: .* has those of ranks 0, 1"):
        tmm.open_run(two / "run", rank=2)


def test_it_is_listed_and_reported_as_one(two: Path, tmp_path: Path) -> None:
    (record,) = (record for record in list_runs(two) if record.path.name == "run")
    assert (record.status, record.steps) == ("finished", 3)
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(two / "run"), "-o", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert "run, rank 0" in text
    assert "run, rank 1" in text
    assert "[rank 1]" not in text.partition('id="curves-0"')[0].partition("/* data */")[2]
    shown = CliRunner().invoke(app, ["show", str(two / "run"), "-m", "loss", "--json"])
    assert {key["key"] for key in json.loads(shown.output)["keys"]} == {
        "loss[rank 0]",
        "loss[rank 1]",
    }


def test_all_ranks_go_to_the_same_folder(two: Path) -> None:
    for name, count in (("taken", 3), ("taken-2", 1)):
        with tmm.open_run(two / name) as run:
            assert run.ranks == [0, 1]
            assert len(run.steps) == count


def test_a_run_that_goes_on(two: Path) -> None:
    with tmm.open_run(two / "resumed") as run:
        assert run.ranks == [0, 1]
        assert len(run.info["starts"]) == 2
        assert run.steps.tolist() == [0, 2, 4]
        for rank in (0, 1):
            assert run.series(f"loss[rank {rank}]")[0].tolist() == [0, 2, 4]
            # Step 2 is the first of the second start, with the parameters of the beginning.
            with tmm.open_run(two / "taken", rank=rank) as other:
                assert run.at(2)[f"loss[rank {rank}]"] != other.at(2)["loss"]
    files = [name for name in os.listdir(two / "resumed") if name.endswith(".h5")]
    assert len(files) == 4


def test_all_ranks_are_told_that_rank_0_cannot_record(two: Path) -> None:
    first, second = result(two, "refused")[0]["errors"]
    assert "is a file; give a folder" in first
    assert second.startswith("per_rank=True: rank 0 cannot record: NotADirectoryError")


def test_a_rank_that_dies_leaves_what_it_had(tmp_path: Path, interpreters: Interpreters) -> None:
    launch(interpreters, 2, tmp_path, ("killed",), MODULE)
    with tmm.open_run(tmp_path / "killed", rank=1) as run:
        assert run.steps.tolist() == [0, 2]
    with tmm.open_run(tmp_path / "killed") as run:
        assert run.ranks == [0, 1]


def write(folder: Path, rank: int | None, values: dict[int, float]) -> None:
    infos = (KeyInfo("activation/0/rms", "activation", "0", 0, "mean"),)
    with RunWriter(folder, info={}, rank=rank) as writer:
        for step, value in values.items():
            writer.submit(StepRecord(step, scalars=(Table(infos, np.array([value])),)))


def test_ranks_with_other_steps(tmp_path: Path) -> None:
    write(tmp_path, 0, {0: 1.0, 2: 2.0, 5: 3.0})
    write(tmp_path, 11, {1: 4.0, 2: 5.0})
    write(tmp_path, 0, {5: 30.0, 6: 40.0})
    with tmm.open_run(tmp_path) as run:
        assert run.ranks == [0, 11]
        assert run.steps.tolist() == [0, 1, 2, 5, 6]
        first, second = "activation/0[rank 0]/rms", "activation/0[rank 11]/rms"
        assert run.keys() == [first, second]
        steps, values = run.series(first)
        assert dict(zip(steps.tolist(), values.tolist(), strict=True)) == {
            0: 1.0,
            2: 2.0,
            5: 30.0,
            6: 40.0,
        }
        assert run.series(second)[0].tolist() == [1, 2]
        assert run.at(2) == {first: 2.0, second: 5.0}
        assert run.at(1) == {second: 4.0}
        _, table, measured = run.table([second, first])
        assert measured.tolist() == [
            [False, True, True, False, False],
            [True, False, True, True, True],
        ]
        assert table[1][measured[1]].tolist() == [1.0, 2.0, 30.0, 40.0]
        write(tmp_path, 11, {7: 6.0})  # while somebody reads
        assert run.series(second)[0].tolist() == [1, 2, 7]


def test_deleting_takes_the_segments_of_all_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "p"
    write(folder, 0, {0: 1.0})
    write(folder, 1, {0: 1.0})
    State.begin().end("finished", "", 0).write(folder)
    record = find_run(str(folder), tmp_path / "runs")
    assert delete_run(record, tmp_path / "runs") == ()
    assert not folder.exists()


def test_runs_in_folders_of_ranks_are_read_as_before(tmp_path: Path) -> None:
    for rank in (0, 1):
        write(tmp_path / "run" / f"rank-{rank}", None, {0: 1.0 + rank})
        State.begin().end("finished", "", 0).write(tmp_path / "run" / f"rank-{rank}")
    assert len(list_runs(tmp_path)) == 2
    with tmm.open_run(tmp_path / "run" / "rank-1") as run:
        assert run.ranks == []
        assert run.series("activation/0/rms")[1].tolist() == [2.0]
    with pytest.raises(ValueError, match="rank=1: .* has none of single ranks"):
        tmm.open_run(tmp_path / "run" / "rank-1", rank=1)


# Which rank is apart


def test_the_rank_that_is_unlike_the_others_comes_first() -> None:
    generator = np.random.default_rng(0)
    steps = np.arange(20)
    usual = {key: generator.random(20) + 1 for key in ("loss", "activation/0/rms", "a/b")}

    def one(factor: float, last: float | None = None) -> RecordedSeries:
        series = {key: (steps, values * factor) for key, values in usual.items()}
        if last is not None:
            series["loss"][1][-1] = last
        return RecordedSeries(series)

    found = ranks_apart({0: one(1.0), 1: one(1.001), 2: one(1.3), 3: one(0.999)})
    assert next(iter(found)) == 2
    assert found[2] == pytest.approx(0.3, abs=0.01)
    found = ranks_apart({0: one(1.0), 1: one(1.0, np.nan), 2: one(1.0)})
    assert next(iter(found)) == 1
    assert found[0] == found[2] == 0.0
    assert ranks_apart({}) == {}
    assert ranks_apart({0: one(1.0)}) == {0: 0.0}


def test_a_report_of_many_ranks_shows_those_that_are_apart(tmp_path: Path) -> None:
    for rank in range(12):
        write(tmp_path / "run", rank, {0: 1.0 + (rank == 9), 1: 2.0 - 0.01 * rank})
    State.begin().end("finished", "", 1).write(tmp_path / "run")
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "-o", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    shown = [rank for rank in range(12) if f"run, rank {rank}" in text]
    assert len(shown) == 8
    assert {0, 9} <= set(shown)
