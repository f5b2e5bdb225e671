"""What was flushed is there after a process was killed or its disk was full."""

import errno
import os
import random
import subprocess
import time

import pytest

from tests.crashing_processes import DONE, histogram, values
from tests.interpreters import ROOT
from tmm.runs.recorded_run import open_run
from tmm.runtime.store.segment_layout import segment_paths

TRIALS = 15
CALL = """
import sys
from tests import crashing_processes
getattr(crashing_processes, sys.argv[1])(sys.argv[2], *map(int, sys.argv[3:]))
"""


def check_step(run, step, trial):
    expected = values(step, trial)
    if step % 5 == 0:
        expected["h"] = pytest.approx(histogram(step, trial), abs=0)
    assert run.at(step) == expected


def test_a_killed_process_loses_nothing_that_was_flushed(tmp_path, interpreters):
    moment = random.Random(0)
    owner: dict[int, int] = {}  # of each step that was acknowledged, the newest trial
    cut_short = 0
    for trial in range(TRIALS):
        first = max(0, max(owner, default=0) - 5)  # as from a checkpoint, a few steps back
        process = interpreters.start(
            CALL, "write_until_killed", tmp_path, first, trial, folder=ROOT
        )
        said = []
        if trial % 3:  # else the moment may be within the creation of the segment
            said.append(process.stdout.readline())
        time.sleep(moment.uniform(0.0, 0.1))
        process.kill()
        said += process.stdout
        process.close()
        acknowledged = [line.strip() for line in said]
        cut_short += acknowledged[-1:] != [DONE]
        steps = [int(step) for step in acknowledged if step != DONE]
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
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runs.recorded_run import open_run
from tmm.runtime.store.run_writer import RunWriter

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
def test_a_full_disk_raises_in_the_loop_and_harms_nothing(small_disk, closes, reads, interpreters):
    folder, limit, number = small_disk
    done = interpreters.run(FULL, folder, limit, closes, reads, warns=False)
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


def test_wherever_in_the_file_the_disk_becomes_full(tmp_path, interpreters):
    counts = set()
    for limit in (*range(1000, 57_000, 1999), *range(57_000, 400_000, 12_000)):
        folder = tmp_path / str(limit)
        done = interpreters.run(CALL, "fill_disk", folder, limit, folder=ROOT)
        assert done.returncode == 0, limit
        steps = [int(line) for line in done.stdout.splitlines()]
        counts.add(len(steps))
        with open_run(folder) as run:
            assert run.steps.tolist() == steps == list(range(len(steps)))
            for step in steps:
                check_step(run, step, 0)
    assert len(counts) > 5


def test_a_disk_that_is_full_from_the_start(tmp_path, interpreters):
    script = FULL.replace(
        "run = open_run", "resource.setrlimit(resource.RLIMIT_FSIZE, (9,) * 2)\nrun = open_run"
    )
    done = interpreters.run(script, tmp_path, 100_000, True, False, warns=False)
    assert (done.returncode, done.stderr) == (0, "")
    raised, *_ = done.stdout.splitlines()
    assert raised.startswith(f"raised {errno.EFBIG} ")
    assert "cannot create" in raised
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == []
