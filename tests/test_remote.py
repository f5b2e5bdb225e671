"""Runs that lie elsewhere, read by their address."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import pytest
from typer.testing import CliRunner

import tmm
from tmm.cli import app
from tmm.runs.catalog import find_run


@pytest.fixture
def address(tmp_path: Path) -> str:
    """A run in a store that is no file system, such as ``s3://``."""
    with tmm.start_run("p", name="far", root=tmp_path, system_seconds=None) as run:
        for step in range(5):
            run.log({"loss": 1.0 / (step + 1)})
            run.step()
        run.log_samples(2, {"text": "hello"})
    store = fsspec.filesystem("memory")
    store.put(str(run.path), "/bucket/run", recursive=True)
    return "memory://bucket/run"


def test_a_run_is_read_from_another_store(address: str) -> None:
    run = tmm.open_run(address)
    copy = run.path
    with run:
        assert run.series("loss")[1].tolist() == [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5]
        assert run.samples(2) == {"text": "hello"}
        assert run.info["name"] == "far"
    del run
    assert not copy.exists()


def test_commands_take_addresses(address: str) -> None:
    shown = CliRunner().invoke(app, ["show", address, "--json"])
    assert shown.exit_code == 0, shown.output
    assert json.loads(shown.output)["name"] == "far"
    assert find_run(address).steps == 5


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing at memory://nowhere"):
        tmm.open_run("memory://nowhere")
    with pytest.raises(ValueError, match="Protocol not known"):
        tmm.open_run("carrier-pigeon://run")
    failed = CliRunner().invoke(app, ["show", "memory://nowhere"])
    assert failed.exit_code == 1
