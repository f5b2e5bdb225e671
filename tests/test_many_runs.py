"""Lists of many runs: what is known of them is kept, and is never wrong."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import fsspec
import numpy as np
import pytest
from torch import nn
from typer.testing import CliRunner

import tmm
from tmm.cli import app
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runs import run_index, run_record
from tmm.runs.catalog import delete_run, find_run, list_runs, runs_to_prune
from tmm.runs.remote import address_of
from tmm.runs.run_record import RunRecord
from tmm.runs.state import LOCK_NAME, STATE_NAME, Lock, State
from tmm.runtime.store.run_writer import RunWriter

COUNT = 60
LONG_AGO = 1_700_000_000


@pytest.fixture
def indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the indexes of this test lie."""
    folder = tmp_path / "indexes"
    monkeypatch.setenv(run_index.VARIABLE, str(folder))
    return folder


@pytest.fixture(scope="module")
def pattern(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many runs that have ended long ago."""
    root = tmp_path_factory.mktemp("pattern")
    for number in range(COUNT):
        write_run(root / "p" / f"run-{number:03d}", number)
    return root


@pytest.fixture
def root(tmp_path: Path, indexes: Path, pattern: Path) -> Path:
    """A copy of them, which a test may change."""
    return shutil.copytree(pattern, tmp_path / "runs")


def write_run(folder: Path, number: int, steps: int = 2) -> None:
    info = {
        "id": folder.name,
        "project": "p",
        "name": f"name {number}",
        "config": {"lr": number, "deep": [1, {"a": None}]},
        "tags": ["even"] if number % 2 == 0 else [],
        "notes": "é \ud83d",
    }
    with RunWriter(folder, info=info) as writer:
        submit(writer, range(steps))
    State.begin().end("finished", "", steps - 1).write(folder)
    age(folder)


def submit(writer: RunWriter, steps: range) -> None:
    infos = (KeyInfo("loss", "", "loss", 0, "mean"),)
    for step in steps:
        writer.submit(StepRecord(step, scalars=(Table(infos, np.array([1.0])),)))


def age(folder: Path, seconds: float = LONG_AGO) -> None:
    for path in folder.iterdir():
        os.utime(path, (seconds, seconds))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs whose ``run.json`` was read, or whose steps were counted."""
    names: list[str] = []

    def spied(module: object, name: str, folder: Callable[[Path], str]) -> None:
        original = getattr(module, name)

        def spy(path: Path) -> object:
            names.append(folder(path))
            return original(path)

        monkeypatch.setattr(module, name, spy)

    spied(run_record, "read_info", lambda path: path.name)
    spied(run_record, "open_run", lambda path: path.name)
    return names


def without_index(root: Path | str) -> tuple[RunRecord, ...]:
    """What there is, read anew."""
    before = os.environ[run_index.VARIABLE]
    os.environ[run_index.VARIABLE] = ""
    try:
        return list_runs(root)
    finally:
        os.environ[run_index.VARIABLE] = before


def test_what_is_known_is_not_read_again(root: Path, indexes: Path, read: list[str]) -> None:
    first = list_runs(root)
    assert len(first) == COUNT
    assert len(read) == 2 * COUNT
    read.clear()
    assert list_runs(root) == first == tuple(sorted(first, key=lambda r: (r.started, r.id)))[::-1]
    assert read == []
    assert first[0].config == {"lr": first[0].config["lr"], "deep": [1, {"a": None}]}  # type: ignore[index]
    assert {record.steps for record in first} == {2}
    assert len(list(indexes.iterdir())) == 1
    assert without_index(root) == first


def test_few_runs_are_just_read(tmp_path: Path, indexes: Path) -> None:
    for number in range(5):
        write_run(tmp_path / "runs" / f"run-{number}", number)
    list_runs(tmp_path / "runs")
    assert not indexes.exists()


def change_config(folder: Path) -> None:
    info = json.loads((folder / "run.json").read_text())
    info["config"] = {"lr": -1}
    (folder / "run.json").write_text(json.dumps(info, indent=2))


def change_in_place(folder: Path) -> None:
    """As long as before, and as old."""
    text = (folder / "run.json").read_bytes().replace(b'"name 5"', b'"nome 5"')
    with (folder / "run.json").open("rb+") as file:
        file.write(text)
    os.utime(folder / "run.json", (LONG_AGO, LONG_AGO))


def take_older_copy(folder: Path) -> None:
    """Another file as long and as old takes its place."""
    other = folder / ".other"
    shutil.copy2(folder / "run.json", other)
    other.write_bytes(other.read_bytes().replace(b'"name 5"', b'"nome 5"'))
    os.utime(other, (LONG_AGO, LONG_AGO))
    other.replace(folder / "run.json")


def record_more(folder: Path) -> None:
    with RunWriter(folder, info={}) as writer:
        submit(writer, range(2, 7))


def fail(folder: Path) -> None:
    State.begin().end("failed", "a reason", 1).write(folder)


def damage(folder: Path) -> None:
    (folder / "run.json").write_text("{")


def damage_segment(folder: Path) -> None:
    (segment,) = folder.glob("*.h5")
    segment.write_bytes(b"no HDF5" * 100)


def lose_state(folder: Path) -> None:
    (folder / STATE_NAME).unlink()


@pytest.mark.parametrize(
    "change",
    [
        *(change_config, change_in_place, take_older_copy, record_more, fail, damage),
        *(damage_segment, lose_state, shutil.rmtree),
    ],
)
def test_a_run_that_changes_is_read_again(root: Path, change: Callable[[Path], None]) -> None:
    before = list_runs(root)
    time.sleep(0.02)  # more than the resolution of the time of change
    change(root / "p" / "run-005")
    after = list_runs(root)
    assert after != before
    assert after == without_index(root)
    assert list_runs(root) == after


def test_runs_come_and_go(root: Path, read: list[str]) -> None:
    list_runs(root)
    shutil.move(root / "p" / "run-003", root / "p" / "moved")
    shutil.rmtree(root / "p" / "run-004")
    write_run(root / "p" / "new", 7)
    read.clear()
    found = list_runs(root)
    assert found == without_index(root)
    assert set(read[: len(read) - 2 * COUNT]) == {"moved", "new"}
    (record,) = (record for record in found if record.path.name == "moved")
    assert record.id == "run-003"


def test_a_run_that_goes_on_is_running(root: Path) -> None:
    state = State.begin()
    for name in ("run-001", "run-002"):
        replace(state, process=2**22 - 1).write(root / "p" / name)
        (root / "p" / name / LOCK_NAME).touch()
        age(root / "p" / name)
    by_name = {record.id: record for record in list_runs(root)}
    assert by_name["run-001"].status == by_name["run-002"].status == "crashed"
    lock = Lock(root / "p" / "run-001")
    try:
        by_name = {record.id: record for record in list_runs(root)}
        assert by_name["run-001"].status == "running"
        assert by_name["run-002"].status == "crashed"
        assert list_runs(root, status="running") == (by_name["run-001"],)
    finally:
        lock.release()
    assert list_runs(root) == without_index(root)


def test_what_is_written_now_is_not_kept(root: Path, indexes: Path, read: list[str]) -> None:
    age(root / "p" / "run-005", time.time())
    age(root / "p" / "run-006", time.time() + 1e6)  # a clock that is ahead
    list_runs(root)
    read.clear()
    list_runs(root)
    assert set(read) == {"run-005", "run-006"}


@pytest.mark.parametrize("kept", [0, 1, 50, 0.5, -1])
def test_an_index_that_was_cut_off_counts_as_none(root: Path, indexes: Path, kept: float) -> None:
    before = list_runs(root)
    (file,) = indexes.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept * len(whole)) if kept == 0.5 else int(kept)])
    assert list_runs(root) == before
    assert file.read_bytes() == whole  # written anew


def test_an_index_that_was_changed_counts_as_none(root: Path, indexes: Path) -> None:
    before = list_runs(root)
    (file,) = indexes.iterdir()
    whole = file.read_bytes()
    for changed in (
        whole.replace(b"name 5", b"nama 5"),
        whole.replace(b'"format": 1', b'"format": 0'),
        b"[]\n" + whole.partition(b"\n")[2],
        b"\xff" * 100,
        b"[" * 10_000,
    ):
        file.write_bytes(changed)
        assert list_runs(root) == before


def test_an_index_that_cannot_be_written_is_left_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = without_index(root)
    (tmp_path / "file").touch()
    for place in (str(tmp_path / "file" / "below"), "relative", "~nobody", "/proc/nowhere", ""):
        monkeypatch.setenv(run_index.VARIABLE, place)
        assert list_runs(root) == before
    monkeypatch.delenv(run_index.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert list_runs(root) == before


def test_runs_that_nobody_may_write_to_are_listed(
    root: Path, indexes: Path, read: list[str]
) -> None:
    folders = [root, root / "p", *(root / "p").iterdir()]
    for folder in folders:
        folder.chmod(0o500)
    try:
        before = list_runs(root)
        names = sorted(os.listdir(root))
        read.clear()
        assert list_runs(root) == before
        assert read == []
        assert sorted(os.listdir(root)) == names
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert indexes.stat().st_mode & 0o077 == 0


def test_several_list_at_once(root: Path) -> None:
    expected = without_index(root)
    found: list[tuple[RunRecord, ...]] = []
    threads = [threading.Thread(target=lambda: found.append(list_runs(root))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


def test_roots_do_not_mix(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(root, other)
    for folder in (other / "p").iterdir():
        change_config(folder)
        age(folder)
    assert {record.config["lr"] for record in list_runs(other)} == {-1}  # type: ignore[index]
    assert {record.config["lr"] for record in list_runs(root)} == set(range(COUNT))  # type: ignore[index]
    linked = tmp_path / "linked"
    linked.symlink_to(root)
    assert {record.path.parent.parent for record in list_runs(linked)} == {linked}


def test_a_run_is_found_by_its_name(root: Path, read: list[str]) -> None:
    list_runs(root)
    read.clear()
    assert find_run("name 17", root).id == "run-017"
    assert set(read) == {"run-017"}
    with pytest.raises(LookupError, match="nearest are name 17"):
        find_run("name 177", root)


def test_a_limit_counts_the_steps_of_as_many(root: Path, read: list[str]) -> None:
    for number in range(0, COUNT, 2):
        folder = root / "p" / f"run-{number:03d}"
        damage_segment(folder)
        age(folder)
    assert len(list_runs(root, status="finished", limit=5)) == 5
    assert {record.status for record in list_runs(root, status="broken", limit=50)} == {"broken"}
    assert len(list_runs(root, status="broken", limit=50)) == COUNT // 2
    assert len(list_runs(root, tag="even", limit=10)) == 10


def test_far_away_files_are_read_at_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = without_index(root)
    original = run_record.read_info
    threads = set()

    def slow(path: Path) -> dict[str, object]:
        time.sleep(0.005)
        threads.add(threading.current_thread().name)
        return original(path)

    monkeypatch.setattr(run_record, "read_info", slow)
    assert list_runs(root) == expected
    assert len(threads) > 5


# Stores


@pytest.fixture
def address(root: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    store.put(str(root), "/bucket/runs", recursive=True)
    yield "memory://bucket/runs"
    store.store.clear()
    store.pseudo_dirs[:] = [""]


def test_the_runs_of_a_store_are_listed(address: str, root: Path) -> None:
    here = [replace(record, path=Path(), steps=None) for record in list_runs(root)]
    there = list_runs(address)
    assert [replace(record, path=Path()) for record in there] == here
    assert there[0].address == f"{address}/p/{there[0].id}"
    with tmm.open_run(there[0].path) as run:
        assert run.steps.tolist() == [0, 1]
    assert list_runs(address, tag="even", limit=3) == tuple(r for r in there if r.tags)[:3]
    assert find_run("run-007", address).steps == find_run("name 7", address).steps == 2


def test_runs_of_a_store_are_kept_in_mind(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    for content in store.store.values():
        content.modified = content.created = content.created.replace(year=2020)
    before = list_runs(address)
    asked: list[str] = []
    cat = type(store).cat

    def spy(self: object, path: list[str], **options: object) -> object:
        asked.extend(path)
        return cat(self, path, **options)

    monkeypatch.setattr(type(store), "cat", spy)
    assert list_runs(address) == before
    assert asked == []
    text = store.cat_file("/bucket/runs/p/run-005/run.json").replace(b"name 5", b"other!")
    store.pipe_file("/bucket/runs/p/run-005/run.json", text)
    store.rm("/bucket/runs/p/run-006", recursive=True)
    after = list_runs(address)
    assert asked == [f"/bucket/runs/p/run-005/{name}" for name in ("run.json", "state.json")]
    assert {record.id for record in before} - {record.id for record in after} == {"run-006"}
    assert "other!" in {record.name for record in after}
    assert after == without_index(address)


def test_what_is_no_run_in_a_store(address: str) -> None:
    store = fsspec.filesystem("memory")
    store.pipe_file("/bucket/runs/q/foreign/run.json", b"{}")
    store.pipe_file("/bucket/runs/q/.hidden/run.json", b'{"starts": []}')
    store.pipe_file("/bucket/runs/q/broken/run.json", b'{"starts": 5}')
    store.pipe_file("/bucket/runs/q/long/run.json", b" " * (9 << 20))
    store.pipe_file("/bucket/runs/q/damaged/run.json", b'{"starts": [], "id": "damaged"}')
    store.pipe_file("/bucket/runs/q/damaged/state.json", b"[]")
    found = {r.id: r for r in list_runs(address) if r.path.parent.name == "q"}
    assert {name: record.status for name, record in found.items()} == dict.fromkeys(
        ("broken", "long", "damaged"), "broken"
    )
    assert "longer" in found["long"].reason


def test_a_run_of_another_machine_is_running_as_it_says(address: str) -> None:
    store = fsspec.filesystem("memory")
    for number, host in enumerate(("elsewhere", os.uname().nodename)):
        state = json.loads(store.cat_file(f"/bucket/runs/p/run-00{number}/state.json"))
        state |= {"status": "running", "host": host, "process": 2**22 - 1, "ended": ""}
        place = f"/bucket/runs/p/run-00{number}"
        store.pipe_file(f"{place}/state.json", json.dumps(state).encode())
        store.pipe_file(f"{place}/alive.lock", b"")
    statuses = {record.id: record.status for record in list_runs(address)}
    assert (statuses["run-000"], statuses["run-001"]) == ("running", "crashed")
    assert find_run(f"{address}/p/run-000").status == "running"
    assert find_run(f"{address}/p/run-001").status == "crashed"


def test_commands_take_the_address_of_a_root(address: str, tmp_path: Path) -> None:
    place = ["--root", address]
    listed = CliRunner().invoke(app, ["list", *place, "--json"])
    assert listed.exit_code == 0, listed.output
    assert len(json.loads(listed.output)) == 50
    assert json.loads(listed.output)[0]["path"].startswith(f"{address}/p/run-")
    compared = CliRunner().invoke(app, ["compare", "run-001", "name 2", *place, "--json"])
    assert compared.exit_code == 0, compared.output
    assert json.loads(compared.output)["config"]["lr"] == {"name 1": 1, "name 2": 2}
    page = tmp_path / "report.html"
    written = CliRunner().invoke(app, ["report", "run-001", "run-002", *place, "-o", str(page)])
    assert written.exit_code == 0, written.output
    assert "name 2" in page.read_text()
    watched = CliRunner().invoke(app, ["watch", *place, "--once", "--json"])
    assert watched.exit_code == 0, watched.output
    for command in (["delete", "run-001"], ["runs", "prune", "--older-than", "1m"]):
        refused = CliRunner().invoke(app, [*command, *place, "--yes"])
        assert refused.exit_code == 1
        assert "tool of the store" in refused.output


def test_nothing_is_recorded_or_deleted_in_a_store(address: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root='s3://bucket/runs'.*into folders of this machine"):
        tmm.start_run("p", root="s3://bucket/runs")
    with pytest.raises(ValueError, match="run='s3://bucket/run'.*into folders of this machine"):
        tmm.instrument(nn.Linear(2, 2), tmm.Spec(tmm.activation("rms")), run="s3://bucket/run")
    with pytest.raises(ValueError, match="tool of the store"):
        delete_run(list_runs(address)[0], address)
    with pytest.raises(ValueError, match="tool of the store"):
        runs_to_prune(address, timedelta(days=1))
    with pytest.raises(FileNotFoundError, match="nothing at memory://none"):
        list_runs("memory://none")


def test_addresses_survive_being_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("s3://bucket/a/b", "simplecache::s3://bucket/a", "memory://a"):
        assert address_of(address) == address_of(Path(address)) == address
    for here in ("runs/a", "/runs/a", "file:///runs/a", "C:/runs", "a:b/c", "local:///x"):
        assert address_of(here) is None
        assert address_of(Path(here)) is None
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    assert address_of(Path("s3:/bucket")) is None
