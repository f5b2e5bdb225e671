"""Hostile and damaged files: reading never hangs, crashes, grows or writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

import tmm
from tests.hostile_runs import LONG_AGO, SAMPLE, STEPS, read_all, write_run
from tmm.cli import app
from tmm.runs.catalog import find_run, list_runs
from tmm.runs.state import LOCK_NAME, STATE_NAME, Lock
from tmm.runtime.store.run_file import INFO_NAME
from tmm.runtime.store.run_writer import RunWriter
from tmm.runtime.store.untrusted import DEEPEST, parse_json, read_file

SEGMENT = "metrics-001.h5"
SECONDS = 20  # for what takes some hundredths of one


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody changes."""
    return write_run(tmp_path_factory.mktemp("sound") / "run")


@pytest.fixture
def root(sound: Path, tmp_path: Path) -> Path:
    """A folder with two runs: ``good`` and ``odd``."""
    for name in ("good", "odd"):
        shutil.copytree(sound, tmp_path / "runs" / name)
        info = json.loads((sound / INFO_NAME).read_text()) | {"id": name, "name": name}
        (tmp_path / "runs" / name / INFO_NAME).write_text(json.dumps(info))
    return tmp_path / "runs"


@pytest.fixture(autouse=True)
def promptly() -> Iterator[None]:
    """What hangs is interrupted."""

    def interrupt(*_: object) -> None:
        raise TimeoutError(f"it took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def listed(root: Path) -> dict[str, tuple[str, str]]:
    """Status and reason of the runs, of which one is good; nobody has written to them lately."""
    for path in (root / "odd").iterdir():
        os.utime(path, (LONG_AGO, LONG_AGO), follow_symlinks=False)
    found = {record.path.name: (record.status, record.reason) for record in list_runs(root)}
    assert found.pop("good") == ("finished", "")
    assert all("\n" not in reason for _, reason in found.values())
    return found


def refused(root: Path, match: str) -> None:
    """The odd run is listed as broken, and why, and cannot be opened, shown or compared."""
    status, reason = listed(root)["odd"]
    assert status == "broken"
    assert match in reason
    assert told(root, "show", "odd") == 1


def told(root: Path, *command: str) -> int:
    """The exit status of a command, which says what is wrong and does not fail otherwise."""
    result = CliRunner().invoke(app, [*command, "--root", str(root)])
    assert isinstance(result.exception, (SystemExit, type(None))), command
    return result.exit_code


# Segments that HDF5 would obey


def rebuilt(path: Path, add: Callable[[h5py.File], None], *left_out: str, size: int = 0) -> None:
    """A segment with other datasets in it, and as large as its commits ask for."""
    whole = path.stat().st_size
    with h5py.File(path, "r") as old, h5py.File(path.with_suffix(".new"), "w", libver=V110) as file:
        for name in old:
            if name not in left_out:
                old.copy(name, file)
        file.attrs["format"] = old.attrs["format"]
        add(file)
    path.with_suffix(".new").replace(path)
    os.truncate(path, max(whole, size, path.stat().st_size))


V110 = ("v110", "v110")


def dataset(name: str, shape: tuple[int, ...], dtype: Any, **options: Any) -> Any:
    def add(file: h5py.File) -> None:
        file.create_dataset(name, shape, dtype=dtype, **options)

    return add, name


def virtual(name: str, shape: tuple[int, ...], dtype: str, source: str) -> Any:
    def add(file: h5py.File) -> None:
        layout = h5py.VirtualLayout(shape=shape, dtype=dtype)
        layout[:] = h5py.VirtualSource(source, name, shape=shape)
        file.create_virtual_dataset(name, layout)

    return add, name


def link(name: str, target: Any) -> Any:
    def add(file: h5py.File) -> None:
        file[name] = target

    return add, name


def alias(name: str, other: str) -> Any:
    return lambda file: file.__setitem__(name, file[other]), name


GROWING = {"maxshape": (None,), "chunks": (512,)}
GROWING_COMMITS = {"maxshape": (None, 10), "chunks": (128, 10)}
GROWING_VALUES = {"maxshape": (None, None), "chunks": (32, 64)}
HUGE = (1, 2**28)
ARRAYS = h5py.vlen_dtype("<i8")
OUTSIDE = [("/dev/zero", 0, h5py.h5f.UNLIMITED)]

HOSTILE = {
    "virtual commits": virtual("commits", (STEPS, 10), "<i8", SEGMENT),
    "virtual steps": virtual("steps", (STEPS,), "<i8", "/dev/zero"),
    "virtual values": virtual("values", (STEPS, 20), "<f8", "."),
    "virtual keys": virtual("keys", (2000,), "u1", "/etc/passwd"),
    "external commits": link("commits", h5py.ExternalLink("metrics-002.h5", "commits")),
    "external steps": link("steps", h5py.ExternalLink("/dev/zero", "steps")),
    "external edges": link("histogram_edges", h5py.ExternalLink(SEGMENT, "histogram_edges")),
    "a loop of links": link("steps", h5py.SoftLink("/steps")),
    "a link inside": link("values", h5py.SoftLink("/few_values")),
    "another name for one": alias("steps", "events"),
    "storage elsewhere": dataset("commits", (STEPS, 10), "<i8", external=OUTSIDE),
    "text elsewhere": dataset("keys", (2000,), "u1", external=OUTSIDE),
    "a group": (lambda file: file.create_group("steps"), "steps"),
    "a huge number of steps": dataset("steps", (2**40,), "<i8", **GROWING),
    "a huge number of commits": dataset("commits", (2**40, 10), "<i8", **GROWING_COMMITS),
    "huge edges": dataset("histogram_edges", (2**36,), "<f8"),
    "huge chunks": dataset("few_values", (STEPS, 1), "<f8", maxshape=(None, None), chunks=HUGE),
    "tiny chunks": dataset("keys", (2000,), "u1", maxshape=(None,), chunks=(1,)),
    "compressed": dataset("steps", (2**28,), "<i8", **GROWING, compression="gzip"),
    "shuffled": dataset("values", (STEPS, 20), "<f8", **GROWING_VALUES, shuffle=True),
    "with checksums": dataset("values", (STEPS, 20), "<f8", **GROWING_VALUES, fletcher32=True),
    "texts of any length": dataset("keys", (50,), h5py.string_dtype(), **GROWING),
    "arrays of any length": dataset("commits", (STEPS, 10), ARRAYS, **GROWING_COMMITS),
    "references": dataset("steps", (STEPS,), h5py.ref_dtype, **GROWING),
    "big-endian": dataset("steps", (STEPS,), ">i8", **GROWING),
    "floats for commits": dataset("commits", (STEPS, 10), "<f8", **GROWING_COMMITS),
    "halves": dataset("values", (STEPS, 20), "<f4", **GROWING_VALUES),
    "records": dataset("values", (STEPS, 20), [("a", "<f8"), ("b", "<i2")], **GROWING_VALUES),
    "another width": dataset("commits", (STEPS, 9), "<i8", maxshape=(None, 9), chunks=(128, 9)),
    "too few dimensions": dataset("values", (STEPS,), "<f8", **GROWING),
    "not in chunks": dataset("values", (STEPS, 20), "<f8"),
    "of one size for ever": dataset("steps", (STEPS,), "<i8", chunks=(8,)),
    "no commits": (lambda file: None, "commits"),
    "fewer commits": dataset("commits", (1, 10), "<i8", **GROWING_COMMITS),
    "a text for a format": (lambda file: file.attrs.__setitem__("format", "2"), "none"),
    "many formats": (lambda file: file.attrs.__setitem__("format", [2, 2]), "none"),
    "a new format": (lambda file: file.attrs.__setitem__("format", 3), "none"),
    "a text for a step": (lambda file: file.attrs.__setitem__("replaces_from", "x"), "none"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_segments_that_no_writer_makes_are_refused(root: Path, kind: str) -> None:
    add, name = HOSTILE[kind]
    rebuilt(root / "odd" / SEGMENT, add, name)
    refused(root, f"{SEGMENT} is not a readable segment")
    with pytest.raises(ValueError, match=f"{SEGMENT} is not a readable segment"):
        read_all(root / "odd")


@pytest.mark.parametrize("libver", ["earliest", "v108", ("v108", "v110"), ("v110", "latest")])
def test_only_the_version_of_hdf5_is_read_that_is_written(root: Path, libver: Any) -> None:
    path = root / "odd" / SEGMENT
    rebuilt(path, lambda file: None)
    read_all(root / "odd")
    with (
        h5py.File(path, "r") as old,
        h5py.File(path.with_suffix(".new"), "w", libver=libver) as file,
    ):
        for name in old:
            old.copy(name, file)
        file.attrs["format"] = 2
    path.with_suffix(".new").replace(path)
    os.truncate(path, 1 << 18)
    if libver[0] == "v110":
        assert read_all(root / "odd") == 2 * STEPS
    else:
        with pytest.raises(ValueError, match=SEGMENT):
            read_all(root / "odd")


def with_text(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    """A segment whose text ``name`` reads otherwise; it keeps its length."""
    with h5py.File(path, "r+", libver=V110) as file:
        text = file[name][:].tobytes()
        file[name][:] = np.frombuffer(change(text)[: len(text)].ljust(len(text)), dtype=np.uint8)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b'"position": 1', b'"position":"1'),
        lambda text: text.replace(b'"site"', b'"Site"'),
        lambda text: text.replace(b'"a/1"', b'"a/2"'),
        lambda text: b"[" * len(text),
        lambda text: bytes(len(text)),
        lambda text: b"\xff" * len(text),
        lambda text: text.replace(b'"mean"', b"[1e99]"),
        lambda text: b"[]\n" * (len(text) // 3),
        lambda text: text.replace(b'"position": 1,', b'"position":1e5'),
        lambda text: text[: len(text) // 2],
    ],
)
def test_keys_that_are_none_are_refused(root: Path, change: Callable[[bytes], bytes]) -> None:
    with_text(root / "odd" / SEGMENT, "keys", change)
    refused(root, SEGMENT)


@pytest.mark.parametrize(
    ("column", "value"),
    [(2, 1 << 62), (2, -1), (3, 1 << 40), (3, -1), (6, 7), (7, 1), (7, -5), (8, 1 << 33), (9, 3)],
)
def test_commits_of_what_is_not_there_are_refused(root: Path, column: int, value: int) -> None:
    with h5py.File(root / "odd" / SEGMENT, "r+", libver=V110) as file:
        file["commits"][-1, column] = value
    refused(root, SEGMENT)


@pytest.mark.parametrize("name", [INFO_NAME, STATE_NAME, SEGMENT])
def test_no_command_fails_on_a_broken_run(root: Path, name: str) -> None:
    (root / "odd" / name).write_bytes(b"[" * 100)
    assert listed(root)["odd"][0] == "broken"
    assert told(root, "list") == told(root, "runs", "prune", "--older-than", "1d", "--yes") == 0
    assert told(root, "watch", "odd") == told(root, "watch", "odd", "--once", "--json") == 1
    for command in ("compare", "anomalies", "plot", "explain", "runs export", "report"):
        place = {"compare": "good", "runs export": str(root.parent / "out.csv")}.get(command)
        told(root, *command.split(), "odd", *([place] if place else []))
    assert told(root, "delete", "odd", "--yes") == 0


# What is no file


def fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def terminal(path: Path) -> None:
    path.symlink_to("/dev/tty")


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 1 << 40)


def unnamed_pipe(path: Path) -> None:
    path.symlink_to("/proc/self/fd/0" if sys.platform == "linux" else "/dev/stdin")


KINDS = (fifo, a_socket, endless, terminal, folder, loop, sparse)


@pytest.mark.parametrize("name", [INFO_NAME, STATE_NAME, SEGMENT])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_of_a_run_is_refused_by_its_kind(
    root: Path, kind: Callable[[Path], None], name: str
) -> None:
    (root / "odd" / name).unlink()
    kind(root / "odd" / name)
    refused(root, name)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_lock_sample_or_text_harms_only_who_asks_for_it(
    root: Path, kind: Callable[[Path], None]
) -> None:
    for name in (LOCK_NAME, SAMPLE, Path("explain.txt")):
        (root / "odd" / name).unlink()
        kind(root / "odd" / name)
    state = json.loads((root / "odd" / STATE_NAME).read_text())
    (root / "odd" / STATE_NAME).write_text(json.dumps(state | {"status": "running"}))
    assert listed(root)["odd"][0] in ("running", "crashed")
    with tmm.open_run(root / "odd") as run:
        assert len(run.steps) == 2 * STEPS
        with pytest.raises((ValueError, OSError, KeyError)):
            run.samples(3)
        with pytest.raises((ValueError, OSError)):
            run.text("explain.txt")
    assert told(root, "explain", "odd") == 1


def test_a_run_that_has_only_what_is_no_file_is_listed(root: Path) -> None:
    for kind in (fifo, endless, folder, loop, sparse):
        (root / kind.__name__).mkdir()
        kind(root / kind.__name__ / INFO_NAME)
    found = listed(root)
    assert {name for name, (status, _) in found.items() if status == "broken"} == {
        *("fifo", "endless", "folder", "loop", "sparse")
    }
    assert "is a FIFO, not a file" in found["fifo"][1]
    assert "at most" in found["sparse"][1]


def test_a_lock_is_no_way_to_another_file(root: Path, tmp_path: Path) -> None:
    """Going on with somebody's run neither empties a file that it links to, nor waits for it."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    lock = root / "odd" / LOCK_NAME
    for make in (lambda: lock.symlink_to(victim), lambda: os.mkfifo(lock), lambda: lock.mkdir()):
        lock.unlink()
        make()
        with pytest.raises(OSError, match=LOCK_NAME):
            Lock(root / "odd")
        assert victim.read_text() == "precious"
        if lock.is_dir():
            lock.rmdir()
            lock.touch()
    Lock(root / "odd").release()


# Texts


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"starts": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"starts": [], "config": {"a": ' + "[" * 200 + "]" * 200 + "}}",
        '{"starts": [], "config": {"a": ' + "9" * 10_000 + "}}",
        '{"starts": [], "notes": "' + "x" * (9 << 20) + '"}',
        '{"starts": []',
        "\x00" * 100,
        "",
        "null",
    ],
)
@pytest.mark.parametrize("name", [INFO_NAME, STATE_NAME])
def test_json_that_is_too_much_is_refused(root: Path, name: str, text: str) -> None:
    (root / "odd" / name).write_text(text)
    refused(root, name)


ODD_VALUES = (None, True, -1, 1e308, float("nan"), "", "x", [], {}, [1], {"a": 1}, [[]], [{}])


@pytest.mark.parametrize("name", [INFO_NAME, STATE_NAME])
def test_fields_of_another_type_break_one_run_at_most(root: Path, name: str) -> None:
    path = root / "odd" / name
    whole = json.loads(path.read_text())
    for field in whole:
        for odd in ODD_VALUES:
            path.write_text(json.dumps(whole | {field: odd}))
            status, reason = listed(root)["odd"]
            assert (status == "broken") == (name in reason), (field, odd)
            if odd in ("x", [1]):
                told(root, "show", "odd")
                told(root, "watch", "odd")
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != field}))
        listed(root)


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        (INFO_NAME, "name", ([], {"a": 1})),
        (INFO_NAME, "config", ([1], "text", 5)),
        (INFO_NAME, "tags", ("text", [1], {"a": 1}, [["a"]])),
        (INFO_NAME, "starts", ("text", [5], {"a": 1}, 7)),
        (STATE_NAME, "status", ("odd", None, ["running"], {})),
        (STATE_NAME, "started", (5, None, [])),
        (STATE_NAME, "reason", (5, None, {})),
        (STATE_NAME, "process", ("1", 1.5, -1, True, None)),
        (STATE_NAME, "last_step", ("1", 1.5, True, [])),
        (STATE_NAME, "host", (None, 5, [])),
    ],
)
def test_each_field_has_its_type(
    root: Path, name: str, field: str, values: tuple[object, ...]
) -> None:
    path = root / "odd" / name
    whole = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps(whole | {field: value}))
        status, reason = listed(root)["odd"]
        assert status == "broken", value
        assert name in reason


def test_numbers_and_times_at_their_ends(root: Path) -> None:
    path = root / "odd" / STATE_NAME
    whole = json.loads(path.read_text())
    ends = ("0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+23:59")
    for time in ends:
        path.write_text(json.dumps(whole | {"started": time, "ended": time, "last_step": 10**30}))
        info = json.loads((root / "odd" / INFO_NAME).read_text()) | {"starts": []}
        (root / "odd" / INFO_NAME).write_text(json.dumps(info))
        assert told(root, "list") == told(root, "show", "odd") == 0
    for process in (0, 2**31, 2**63, 10**30):
        path.write_text(json.dumps(whole | {"status": "running", "process": process}))
        (root / "odd" / LOCK_NAME).unlink(missing_ok=True)
        assert listed(root)["odd"][0] == "crashed"


def test_json_may_be_as_deep_as_it_says() -> None:
    deep = b"[" * DEEPEST + b"]" * DEEPEST
    parse_json(deep)
    parse_json(b'["' + b"[" * 1000 + b'\\"' + b"{" * 1000 + b'"]')  # in a string they are none
    parse_json(b"[" + b",".join([b'{"a": []}'] * 1000) + b"]")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10**6)  # as some programs do, which then crash
    try:
        for text in (b"[" + deep + b"]", b"[" * 200_000, b'{"a":' * 200_000):
            with pytest.raises(ValueError, match="nested"):
                parse_json(text)
    finally:
        sys.setrecursionlimit(limit)


def test_a_file_is_read_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes; at most 4"):
        read_file(path, 4)
    if sys.platform == "linux":  # one that tells no size
        assert read_file(Path("/proc/self/cmdline"), 1 << 20)
        with pytest.raises(ValueError, match="at most 3"):
            read_file(Path("/proc/self/cmdline"), 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": {"data": "x" * (9 << 20)}}, ValueError, r"run\.json"),
        ({"config": {"deep": json.loads("[" * 200 + "]" * 200)}}, ValueError, "nested"),
        ({"name": ["a"]}, TypeError, "name=.* is not text"),
        ({"notes": {"a": 1}}, TypeError, "notes=.* is not text"),
    ],
)
def test_no_run_is_started_that_could_not_be_read(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tmm.start_run("p", root=tmp_path, system_seconds=None, **options)


def test_a_long_reason_is_kept_in_part(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError),
        tmm.start_run("p", root=tmp_path, system_seconds=None) as run,
    ):
        raise RuntimeError("x" * (2 << 20))
    found = find_run(run.id, tmp_path)
    assert found.status == "failed"
    assert "xxx" in found.reason


def test_what_names_no_starts_is_of_another_program(tmp_path: Path) -> None:
    text = '{"starts": null, "name": "n"}'
    (tmp_path / INFO_NAME).write_text(text)
    with pytest.raises(ValueError, match="is of another program"):
        RunWriter(tmp_path, info={})
    assert (tmp_path / INFO_NAME).read_text() == text


# Samples


def npz(entries: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return file.getvalue()


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


def header(descr: str, shape: str) -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x05\x06",
        npz({"array:x.npy": npy(header("'<f8'", "(10**9,)"))}),
        npz({"array:x.npy": npy(header("'<f8'", "(1000000000000,)"))}),
        npz({"array:x.npy": npy(header("'<f8'", "(-1, -8)"), bytes(64))}),
        npz({"array:x.npy": npy(header("'|O'", "(1,)"), b"cos\nsystem\n(S'true'\ntR.")}),
        npz({"array:x.npy": npy(header("[('a', '<f8')]", "(1,)"), bytes(8))}),
        npz({"array:x.npy": npy(header("'<U1000'", "(1,)"), bytes(4000))}),
        npz({"array:x.npy": npy("-" * 9000 + "1")}),
        npz({"array:x.npy": npy("(" * 5000)}),
        npz({"array:x.npy": b"no array"}),
        npz({"array:x.npy": bytes(200 << 20)}),
        npz({"text:x.npy": npy(header("'|u1'", "(2,)"), b"\xff\xfe")}),
        npz({f"array:{n}.npy": b"" for n in range(10_001)}),
        npz({"array:x.npy": npy(header("'<f8'", "(1,)"), bytes(8))}, zipfile.ZIP_LZMA),
    ],
)
def test_samples_that_are_none_are_refused(root: Path, content: bytes) -> None:
    (root / "odd" / SAMPLE).write_bytes(content)
    with tmm.open_run(root / "odd") as run, pytest.raises(ValueError, match=SAMPLE.name):
        run.samples(3)
    assert listed(root)["odd"][0] == "finished"


def test_samples_of_all_kinds_are_read(root: Path) -> None:
    arrays = {
        "array:a%2Fb": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "array:single": np.array(3 + 4j),
        "array:empty": np.empty((0, 3), dtype=np.int16),
        "array:flags": np.array([True, False]),
        "text:t": np.frombuffer("ä".encode(), dtype=np.uint8),
    }
    np.savez(root / "odd" / SAMPLE, **arrays)
    with tmm.open_run(root / "odd") as run:
        found = run.samples(3)
    assert found.pop("t") == "ä"
    for name, array in arrays.items():
        if name.startswith("array:"):
            read = found[name.removeprefix("array:").replace("%2F", "/")]
            assert isinstance(read, np.ndarray)
            assert read.dtype == array.dtype
            assert np.array_equal(read, array)


def test_the_samples_of_a_step_stay_within_their_size(tmp_path: Path) -> None:
    part = np.zeros(1 << 20)  # 8 MiB
    with tmm.start_run("p", root=tmp_path, system_seconds=None) as run:
        run.log_samples(0, {"a": part})
        run.log_samples(0, {"a": part, "b": part[:-1]})
        with pytest.raises(ValueError, match="at most 16 MiB of a step"):
            run.log_samples(0, {"c": part[:2]})
    assert tmm.open_run(run.path).samples(0).keys() == {"a", "b"}


# Runs that lie elsewhere


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files, deep enough that all ways out of it lie below another."""
    folder = tmp_path / "a" / "b" / "temporary"
    folder.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


PLANTED = (
    *("../planted", "../../planted", "samples/../../planted", "./../planted", "a/b/planted"),
    *("..\\planted", "samples\\..\\..\\planted", "C:\\planted", ".hidden", "samples/planted"),
)


@pytest.mark.parametrize("place", ["zip", "memory"])
def test_a_copy_of_a_run_lies_in_its_folder_only(
    sound: Path, tmp_path: Path, temporary: Path, place: str
) -> None:
    names = {path.relative_to(sound): path for path in sound.rglob("*") if path.is_file()}
    bad = (*PLANTED, str(tmp_path / "planted"), f"/{tmp_path}/planted", f"//{tmp_path}/planted")
    if place == "zip":
        with zipfile.ZipFile(tmp_path / "run.zip", "w") as archive:
            for name, path in names.items():
                archive.write(path, name)
            for name in bad:
                entry = zipfile.ZipInfo("x")
                entry.filename = name  # as it is
                archive.writestr(entry, "planted")
            entry = zipfile.ZipInfo("metrics-003.h5.txt")
            entry.external_attr = 0o120777 << 16  # a link
            archive.writestr(entry, "../../planted")
        address = f"zip://::{tmp_path / 'run.zip'}"
    else:
        store = fsspec.filesystem("memory")
        store.store.clear()
        for name, path in names.items():
            store.pipe(f"/hostile/run/{name}", path.read_bytes())
        for name in bad:
            store.store[f"/hostile/run/{name}"] = store.store["/hostile/run/explain.txt"]
        address = "memory://hostile/run"
    before = files_below(tmp_path)
    with tmm.open_run(address) as run:
        assert len(run.steps) == 2 * STEPS
        copied = files_below(run.path)
        (name,) = (path.name for path in temporary.iterdir())
        outside = {path for path in files_below(tmp_path) if f"temporary/{name}" not in path}
    assert outside == before
    assert copied - {"metrics-003.h5.txt"} == (
        {str(path) for path in names} - {LOCK_NAME} | {"samples"}
    )
    assert not any(path.is_symlink() for path in run.path.rglob("*"))


def test_what_has_no_room_is_not_copied(
    sound: Path, tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "run.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sound.glob("*.*"):
            archive.write(path, path.name)
        with archive.open("large.bin", "w") as file:
            for _ in range(257):
                file.write(bytes(1 << 20))
    address = f"zip://::{tmp_path / 'run.zip'}"
    with tmm.open_run(address) as run:
        assert "large.bin" not in files_below(run.path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    with pytest.raises(OSError, match="and 1 are free"):
        tmm.open_run(address)
    del run
    assert files_below(temporary) == set()


def test_other_stores_fail_in_known_ways(tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "empty.zip").write_bytes(npz({"notes": b""}))
    for address in ("no.zip", "empty.zip", "none.zip"):
        with pytest.raises((OSError, ValueError)):
            tmm.open_run(f"zip://::{tmp_path / address}")
    assert files_below(temporary) == set()


def test_an_address_on_this_machine_is_read_where_it_lies(root: Path, temporary: Path) -> None:
    os.mkfifo(root / "good" / "fifo.txt")  # which a copy would wait for
    for scheme in ("file", "local"):
        with tmm.open_run(f"{scheme}://{root / 'good'}") as run:
            assert run.path == root / "good"
            assert len(run.steps) == 2 * STEPS
        assert find_run(f"{scheme}://{root / 'good'}").steps == 2 * STEPS
    assert files_below(temporary) == set()


# All kinds of damage


def read_mutations(root: Path, first: int, count: int) -> dict[str, Any]:
    """What became of mutations, read in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "tests.hostile_runs", str(root), str(first), str(count)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    last = (root / "seed").read_text() if (root / "seed").exists() else "none"
    assert result.returncode == 0, f"at seed {last}: {result.returncode}, {result.stderr[-2000:]}"
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_damaged_run_raises_value_errors_and_nothing_else(tmp_path: Path) -> None:
    signal.alarm(0)  # it has limits of its own
    found = read_mutations(tmp_path, 0, 300)
    assert found["faults"] == []
    assert sum(count for outcome, count in found["outcomes"].items() if "refused" in outcome) > 100
    assert found["outcomes"]["finished"] > 50


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 9000, 2000))
def test_runs_damaged_in_thousands_of_ways(tmp_path: Path, first: int) -> None:
    signal.alarm(0)
    assert read_mutations(tmp_path, first, 2000)["faults"] == []
