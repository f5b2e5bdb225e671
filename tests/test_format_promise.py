"""Runs of the format that is promised to stay readable, as they were once recorded."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest

import tmm
from tmm.runtime.store.segment_layout import FORMAT

KEPT = Path(__file__).parent / "golden" / "run-of-format-2"


@pytest.fixture
def run(tmp_path: Path) -> tmm.Run:
    folder = tmp_path / "golden" / KEPT.name
    shutil.copytree(KEPT, folder)
    packed = folder / "metrics-001.h5.gz"
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    return tmm.open_run(folder)


def test_the_format_has_this_number() -> None:
    """Another one needs a run of its own here, and the page of the format a new chapter."""
    assert FORMAT == 2


def test_a_run_of_format_2_is_read(run: tmm.Run) -> None:
    assert run.steps.tolist() == [0, 1, 2, 3, 4]
    steps, values = run.series("activation/1/rms")
    assert steps.tolist() == [0, 2, 4]
    assert values == pytest.approx([0.25645468, 0.48871533, 0.0])
    assert run.series("loss")[1] == pytest.approx(
        [0.0657690018, 0.2739016413, 0.2388426661, 0.0062149898, 0.0]
    )
    assert run.series("activation/1/histogram")[1].sum(axis=1).tolist() == [12.0, 12.0, 12.0]
    assert len(run.keys()) == 15
    assert run.key_info("gradient/0.weight/norm").site == "0.weight"
    assert run.samples(1) == {"text": "a sample"}
    assert run.info["config"] == {"lr": 0.1}
    assert run.state is not None
    assert run.state.status == "finished"


def test_it_is_listed(run: tmm.Run) -> None:
    (record,) = tmm.list_runs(run.path.parent.parent)
    assert (record.name, record.status, record.tags) == ("format 2", "finished", ("kept",))
