"""What was flushed is there after a process was killed or its disk was full."""

import ctypes
import errno
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import get_context

import numpy as np
import pytest

from tmm.layout import KeyInfo, StepRecord, Table
from tmm.reader import open_run
from tmm.runtime.segment_layout import segment_paths
from tmm.runtime.writer import RunWriter

try:
    import resource
except ImportError:  # not a Unix
    resource = None

LONG = 60.0
TRIALS = 30
STEPS = 80  # in each trial, if it lives to write them


def info(key, position):
    return KeyInfo(key, "k", key, position, "mean")


def values(step, trial):
    """Of which step and trial they are; more keys as steps go on, and gaps."""
    random_values = np.random.default_rng((step, trial)).standard_normal(20 + step // 3)
    known = {f"k/{i}": value for i, value in enumerate(random_values.tolist()) if (i + step) % 4}
    return {"trial": float(trial), **known}


def histogram(step, trial):
    return [step + i / 1024 + trial for i in range(10)]


def record(step, trial):
    known = values(step, trial)
    infos = tuple(info(key, i) for i, key in enumerate(known))
    histograms = ()
    if step % 5 == 0:
        histograms = (Table((info("h", 1000),), np.array([histogram(step, trial)])),)
    return StepRecord(step, (Table(infos, np.array(list(known.values()))),), histograms)


def write_until_killed(path, first, trial, connection):
    writer = RunWriter(path, info={"id": "x"})
    for step in range(first, first + STEPS):
        if writer.submit(record(step, trial), wait_seconds=LONG):
            connection.send(step)
    connection.send(None)
    time.sleep(LONG)


def received(connection):
    while True:
        try:
            yield connection.recv()
        except EOFError:
            return


def check_step(run, step, trial):
    expected = values(step, trial)
    if step % 5 == 0:
        expected["h"] = pytest.approx(histogram(step, trial), abs=0)
    assert run.at(step) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_process_loses_nothing_that_was_flushed(tmp_path):
    context = get_context("forkserver")
    context.set_forkserver_preload(["tmm.runtime.writer", "tmm.reader"])
    moment = random.Random(0)
    owner: dict[int, int] = {}  # of each step that was acknowledged, the newest trial
    cut_short = 0
    for trial in range(TRIALS):
        first = max(0, max(owner, default=0) - 5)  # as from a checkpoint, a few steps back
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=write_until_killed, args=(tmp_path, first, trial, theirs))
        process.start()
        theirs.close()
        if trial % 3:  # else the moment may be within the creation of the segment
            assert ours.poll(LONG)
        time.sleep(moment.uniform(0.0, 0.1))
        process.kill()
        process.join(LONG)
        acknowledged = list(received(ours))
        cut_short += acknowledged[-1:] != [None]
        steps = [step for step in acknowledged if step is not None]
        assert steps == list(range(first, first + len(steps)))
        owner |= dict.fromkeys(steps, trial)
        if not (tmp_path / "run.json").exists():
            assert not steps
            continue
        with open_run(tmp_path) as run:
            found = set(run.steps.tolist())
            assert set(owner) <= found
            for step in steps:
                check_step(run, step, trial)
            # One more may have been flushed, and not yet have been acknowledged.
            begun = first + len(steps)
            if begun in found and run.at(begun)["trial"] == trial:
                check_step(run, begun, trial)
                owner[begun] = trial
            assert found == set(owner)
    assert cut_short > TRIALS // 4
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == sorted(owner)
        for step, trial in owner.items():
            check_step(run, step, trial)
        at, trials = run.series("trial")
        assert dict(zip(at.tolist(), trials.tolist(), strict=True)) == owner
        assert len(run.info["starts"]) <= TRIALS
    assert len(segment_paths(tmp_path)) <= TRIALS
    assert len(segment_paths(tmp_path)) >= len(set(owner.values()))


FULL = """
import resource, signal, sys
import numpy as np
from tmm.layout import KeyInfo, StepRecord, Table
from tmm.reader import open_run
from tmm.runtime.writer import RunWriter

folder, limit, closes, reads = sys.argv[1], int(sys.argv[2]), *map(eval, sys.argv[3:])
if limit:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
infos = tuple(KeyInfo(f"k/{i}", "k", str(i), i, "mean") for i in range(1000))
writer = RunWriter(folder, info={})
run = open_run(folder) if reads else None
for step in range(5000):
    try:
        flushed = writer.submit(
            StepRecord(step, (Table(infos, np.full(1000, step + 0.5)),)), wait_seconds=60
        )
    except OSError as error:
        print("raised", error.errno, error)
        break
    assert flushed
    print(step, flush=True)
    if run and step % 10 == 0:
        assert run.series("k/7")[1].tolist() == [s + 0.5 for s in range(step + 1)]
for call in (lambda: writer.submit(StepRecord(step)), writer.raise_pending):
    try:
        call()
    except OSError as error:
        print("again", error.errno)
if run:
    assert run.series("k/7")[1].tolist() == [s + 0.5 for s in range(step)]
    assert open_run(folder).steps.tolist() == list(range(step))
if closes:
    writer.close()
    writer.close()
"""


@pytest.fixture(params=["file size", "tmpfs"])
def small_disk(request, tmp_path):
    """A folder that takes two megabytes, and the limit that the process has to set for it."""
    if request.param == "file size":
        if resource is None:
            pytest.skip("needs RLIMIT_FSIZE")
        yield tmp_path, 2_000_000, errno.EFBIG
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount")
    yield tmp_path, 0, errno.ENOSPC
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("reads", [False, True], ids=["alone", "read in the process"])
@pytest.mark.parametrize("closes", [True, False], ids=["closed", "not closed"])
def test_a_full_disk_raises_in_the_loop_and_harms_nothing(small_disk, closes, reads):
    folder, limit, number = small_disk
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, folder, str(limit), str(closes), str(reads)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *steps, raised, again, once_more = done.stdout.splitlines()
    count = len(steps)
    assert steps == [str(step) for step in range(count)]
    assert 10 < count < 1000
    assert raised.startswith(f"raised {number} [Errno {number}] cannot write step {count} to ")
    assert "metrics-001.h5" in raised
    assert os.strerror(number) in raised
    assert again == once_more == f"again {number}"
    with open_run(folder) as run:
        assert run.steps.tolist() == list(range(count))
        for key in ("k/0", "k/999"):
            assert run.series(key)[1].tolist() == [step + 0.5 for step in range(count)]


def fill_disk(path, limit, connection):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    writer = RunWriter(path, info={})
    with suppress(OSError):
        for step in range(STEPS):
            if writer.submit(record(step, 0), wait_seconds=LONG):
                connection.send(step)
    with suppress(OSError):
        writer.close()
    ctypes.CDLL(None).exit(0)  # as an interpreter does, with what HDF5 does then


@pytest.mark.skipif(resource is None, reason="needs RLIMIT_FSIZE")
def test_wherever_in_the_file_the_disk_becomes_full(tmp_path):
    context = get_context("forkserver")
    context.set_forkserver_preload(["tmm.runtime.writer", "tmm.reader"])
    counts = set()
    for limit in (*range(1000, 57_000, 1999), *range(57_000, 400_000, 12_000)):
        folder = tmp_path / str(limit)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=fill_disk, args=(folder, limit, theirs))
        process.start()
        theirs.close()
        steps = list(received(ours))
        process.join(LONG)
        assert process.exitcode == 0, limit
        counts.add(len(steps))
        with open_run(folder) as run:
            assert run.steps.tolist() == steps == list(range(len(steps)))
            for step in steps:
                check_step(run, step, 0)
    assert len(counts) > 5


@pytest.mark.skipif(resource is None, reason="needs RLIMIT_FSIZE")
def test_a_disk_that_is_full_from_the_start(tmp_path):
    script = FULL.replace(
        "run = open_run", "resource.setrlimit(resource.RLIMIT_FSIZE, (9,) * 2)\nrun = open_run"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, tmp_path, "100000", "True", "False"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    raised, *_ = done.stdout.splitlines()
    assert raised.startswith(f"raised {errno.EFBIG} ")
    assert "cannot create" in raised
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == []
