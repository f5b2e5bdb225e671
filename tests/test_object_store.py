"""Runs in an S3 store, over HTTP on this machine; skipped without ``moto[server]`` and ``s3fs``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tmm
from tmm.cli import app
from tmm.runs.catalog import list_runs

BUCKET = "tmm-runs"
ROOT = f"s3://{BUCKET}/runs"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The file system of a bucket with two runs of three steps."""
    server_of = pytest.importorskip("moto.server").ThreadedMotoServer
    s3fs = pytest.importorskip("s3fs")
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        with tmm.start_run(name, name=name, root=folder, system_seconds=None) as run:
            for step in range(3):
                run.log({"loss": 1.0 / (step + 1)})
                run.step()
    server = server_of(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patched:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "none")
        patched.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patched.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patched.setenv("TMM_INDEX", str(folder / "index"))
        found = s3fs.S3FileSystem()
        found.mkdir(BUCKET)
        found.put(str(folder), f"{BUCKET}/runs", recursive=True)
        yield found
    server.stop()


def command(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_runs_are_listed_read_and_compared(store: Any, tmp_path: Path) -> None:
    listed = json.loads(command("list", "--root", ROOT, "--json"))
    assert sorted(run["name"] for run in listed) == ["first", "second"]
    (record,) = (run for run in list_runs(ROOT) if run.name == "first")
    with closing(tmm.open_run(record.path)) as run:
        assert run.series("loss")[1].tolist() == [1.0, 1 / 2, 1 / 3]
    assert "loss" in command("compare", "first", "second", "--root", ROOT)
    page = tmp_path / "report.html"
    command("report", "first", "--root", ROOT, "-o", str(page))
    assert "first" in page.read_text()


def test_a_run_that_comes_later_and_one_that_goes(store: Any) -> None:
    assert len(list_runs(ROOT)) == 2
    (address,) = (run.address for run in list_runs(ROOT) if run.name == "second")
    assert address is not None
    source = address.removeprefix("s3://")
    target = f"{BUCKET}/runs/second/later"
    store.copy(source, target, recursive=True)
    assert len(list_runs(ROOT)) == 3
    store.rm(target, recursive=True)
    assert len(list_runs(ROOT)) == 2


def test_what_is_not_there(store: Any) -> None:
    with pytest.raises(FileNotFoundError, match="nothing at s3://"):
        tmm.open_run(f"s3://{BUCKET}/nowhere")
