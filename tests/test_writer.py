import gc
import json
import os
import shutil
import sys
import threading
import weakref

import numpy as np
import pytest

from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runs.recorded_run import open_run
from tmm.runtime.store.run_file import read_info
from tmm.runtime.store.run_writer import RunWriter
from tmm.runtime.store.segment_layout import segment_paths

INFOS = tuple(KeyInfo(f"k/{i}", "k", str(i), i, "mean") for i in range(20))
LONG = 60.0  # seconds that no test waits


def record(step):
    return StepRecord(step, (Table(INFOS, np.arange(20.0) + step),))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def stuck():
    """A record that never comes, as of an accelerator that hangs, until the test ends."""
    release = threading.Event()

    def build():
        release.wait(LONG)
        return record(0)

    yield build
    release.set()


def test_a_run_that_never_records_is_a_folder_with_its_info(tmp_path):
    before = threading.active_count()
    with RunWriter(tmp_path / "a" / "run", info={"id": "x", "list": (1, 2)}):
        assert threading.active_count() == before
    assert names(tmp_path / "a" / "run") == ["run.json"]
    info = read_info(tmp_path / "a" / "run")
    assert (info["id"], info["list"]) == ("x", [1, 2])
    assert [start["process"] for start in info["starts"]] == [os.getpid()]


def test_a_second_start_keeps_the_info_and_adds_what_differs(tmp_path):
    for version in (1, 1, 2):
        RunWriter(tmp_path, info={"id": "x", "version": version}).close()
    info = read_info(tmp_path)
    assert (info["id"], info["version"]) == ("x", 1)
    assert [start.get("info") for start in info["starts"]] == [None, None, {"version": 2}]


def test_wrong_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="starts"):
        RunWriter(tmp_path, info={"starts": []})
    with pytest.raises(TypeError):
        RunWriter(tmp_path, info={"model": object()})
    with pytest.raises(ValueError, match="capacity"):
        RunWriter(tmp_path, info={}, capacity=0)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_a_damaged_info_is_named_and_kept(tmp_path, content):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"run\.json"):
        RunWriter(tmp_path, info={})
    assert (tmp_path / "run.json").read_bytes() == content


def test_records_are_written_in_order_whether_waited_for_or_built_late(tmp_path):
    threads = set()

    def build(step):
        threads.add(threading.current_thread())
        return record(step)

    with RunWriter(tmp_path, info={}) as writer:
        assert not writer.submit(record(0))
        for step in range(1, 100):
            assert writer.submit(lambda step=step: build(step), wait_seconds=LONG)
            if step % 10 == 0:
                with open_run(tmp_path) as run:
                    assert run.steps.tolist() == list(range(step + 1))
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    with open_run(tmp_path) as run:
        assert run.series("k/3")[1].tolist() == [step + 3.0 for step in range(100)]
    assert names(tmp_path) == ["metrics-001.h5", "run.json"]


def test_flush_waits_for_what_was_submitted(tmp_path, stuck):
    with RunWriter(tmp_path, info={}, stall_seconds=0.2) as writer:
        writer.flush()
        for step in range(50):
            writer.submit(record(step))
        writer.flush()
        with open_run(tmp_path) as run:
            assert len(run.steps) == 50
        writer.submit(stuck)
        with pytest.raises(TimeoutError):
            writer.flush()
        with pytest.raises(TimeoutError):
            writer.close()


def test_histogram_edges_reach_the_reader(tmp_path):
    edges = np.array([-np.inf, 0.0, np.inf])
    with RunWriter(tmp_path, info={}, histogram_edges=edges) as writer:
        writer.submit(StepRecord(0, (), (Table(INFOS[:1], np.ones((1, 2))),)))
    with open_run(tmp_path) as run:
        assert run.histogram_edges.tolist() == edges.tolist()
        assert run.at(0)["k/0"].tolist() == [1.0, 1.0]


def test_waiting_ends_after_the_time_given(tmp_path, stuck):
    with RunWriter(tmp_path, info={}, stall_seconds=0.1) as writer:
        assert not writer.submit(stuck, wait_seconds=0.05)
        with pytest.raises(TimeoutError, match=str(tmp_path)):
            writer.close()


def test_a_full_queue_waits_but_not_for_ever(tmp_path, stuck):
    writer = RunWriter(tmp_path, info={}, capacity=2, stall_seconds=0.2)
    with pytest.raises(TimeoutError, match="nothing was written"):
        for _ in range(4):  # one that is being built, two that wait, one too many
            writer.submit(stuck)
    with pytest.raises(TimeoutError):
        writer.close()


def test_a_full_queue_goes_on_when_there_is_room(tmp_path):
    gate = threading.Semaphore(0)

    def build(step):
        assert gate.acquire(timeout=LONG)
        return record(step)

    with RunWriter(tmp_path, info={}, capacity=1) as writer:
        writer.submit(lambda: build(0))
        writer.submit(lambda: build(1))
        timer = threading.Timer(0.1, gate.release, args=(3,))
        timer.start()
        writer.submit(lambda: build(2))  # waits for the timer
        timer.join()
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == [0, 1, 2]


def test_close_is_idempotent_and_ends_submission(tmp_path):
    writer = RunWriter(tmp_path, info={})
    writer.submit(record(0))
    writer.close()
    writer.close()
    writer.raise_pending()
    with pytest.raises(RuntimeError, match="closed"):
        writer.submit(record(1))
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == [0]


def failing():
    raise KeyError("the device is lost")


WRONG = StepRecord(1, (Table(INFOS, np.zeros(3)),))


@pytest.mark.parametrize(("submission", "reason"), [(failing, "lost"), (WRONG, "shape")])
def test_a_record_that_cannot_be_had_ends_the_recording_and_is_raised(tmp_path, submission, reason):
    writer = RunWriter(tmp_path, info={})
    assert writer.submit(record(0), wait_seconds=LONG)
    with pytest.raises(RuntimeError, match=reason) as raised:
        writer.submit(submission, wait_seconds=LONG)
    assert raised.value.__cause__ is not None
    for call in (lambda: writer.submit(record(2)), writer.raise_pending, writer.flush):
        with pytest.raises(RuntimeError, match=reason):
            call()
    writer.close()  # it was raised
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == [0]


def test_an_error_nobody_saw_is_raised_by_close_once(tmp_path):
    writer = RunWriter(tmp_path, info={})
    writer.submit(failing)
    with pytest.raises(RuntimeError, match="lost"):
        writer.close()
    writer.close()


def test_a_thread_ended_from_outside_does_not_go_unnoticed(tmp_path, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    writer = RunWriter(tmp_path, info={})
    with pytest.raises(RuntimeError, match="ended"):
        writer.submit(sys.exit, wait_seconds=LONG)
    writer.close()


def test_a_disk_that_cannot_be_written_raises_oserror_with_path(tmp_path):
    writer = RunWriter(tmp_path / "run", info={})
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "run")):
        writer.submit(record(7), wait_seconds=LONG)
    with pytest.raises(FileNotFoundError):
        writer.submit(record(8))
    writer.close()


def test_nothing_is_kept_of_a_record_once_it_is_written(tmp_path):
    class Device:
        """Stands for memory that a callable holds."""

    device = Device()

    def build(device=device):
        return record(0)

    finalized = threading.Event()
    weakref.finalize(device, finalized.set)
    with RunWriter(tmp_path, info={}) as writer:
        writer.submit(build, wait_seconds=LONG)
        del device, build
        assert finalized.wait(5)


def test_what_still_waits_after_a_failure_is_let_go(tmp_path):
    gate = threading.Event()

    def fail():
        gate.wait(LONG)
        raise KeyError

    def late():
        return record(1)

    finalized = threading.Event()
    weakref.finalize(late, finalized.set)
    writer = RunWriter(tmp_path, info={})
    writer.submit(fail)
    writer.submit(late)
    del late
    gate.set()
    with pytest.raises(RuntimeError):
        writer.close()
    assert finalized.wait(5)


def test_a_writer_that_is_dropped_writes_everything_and_ends_its_thread(tmp_path):
    before = threading.enumerate()
    writer = RunWriter(tmp_path, info={})
    for step in range(50):
        writer.submit(record(step))
    (thread,) = [each for each in threading.enumerate() if each not in before]
    del writer
    gc.collect()
    thread.join(LONG)
    assert not thread.is_alive()
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == list(range(50))


def test_texts_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    text = "é\r\n\ud800\n"
    with RunWriter(tmp_path, info={}) as writer:
        writer.write_text("explain.txt", "old")
        writer.write_text("explain.txt", text)
        for wrong in ("", "..", ".hidden", "a/b", "run.json", "metrics-001.h5"):
            with pytest.raises(ValueError, match="name"):
                writer.write_text(wrong, "")

        def fail(*_):
            raise OSError("no")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="no"):
            writer.write_text("explain.txt", "new")
    with open_run(tmp_path) as run:
        assert run.text("explain.txt") == text
    assert names(tmp_path) == ["explain.txt", "run.json"]


SCRIPT = """
import sys, threading
import numpy as np
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runtime.store.run_writer import RunWriter

infos = tuple(KeyInfo(f"k/{i}", "k", str(i), i, "mean") for i in range(20))
def record(step):
    return StepRecord(step, (Table(infos, np.arange(20.0) + step),))
"""


def test_the_interpreter_writes_what_is_queued_before_it_exits(tmp_path, interpreters):
    script = """
kept = RunWriter(sys.argv[1], info={})
dropped = RunWriter(sys.argv[2], info={})
for step in range(50):
    kept.submit(record(step))
    dropped.submit(record(step))
del dropped
"""
    done = interpreters.run(SCRIPT + script, tmp_path / "kept", tmp_path / "dropped", warns=False)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("kept", "dropped"):
        with open_run(tmp_path / name) as run:
            assert run.steps.tolist() == list(range(50))


def test_exit_reports_an_error_nobody_saw_and_a_hanging_device_and_never_hangs(
    tmp_path, interpreters
):
    script = """
failing = RunWriter(sys.argv[1], info={})
failing.submit(record(0))
failing.submit(lambda: 1 / 0)
stuck = RunWriter(sys.argv[2], info={}, stall_seconds=0.2)
stuck.submit(record(0), wait_seconds=60)
stuck.submit(threading.Event().wait)
"""
    done = interpreters.run(SCRIPT + script, tmp_path / "failing", tmp_path / "stuck", warns=False)
    assert done.returncode == 0
    assert "division by zero" in done.stderr
    assert "nothing was written" in done.stderr
    for name in ("failing", "stuck"):
        with open_run(tmp_path / name) as run:
            assert run.steps.tolist() == [0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused_and_disturbs_nothing(tmp_path, interpreters):
    script = """
import os
writer = RunWriter(sys.argv[1], info={})
for step in range(100):
    writer.submit(record(step))
    if step == 50:
        child = os.fork()
        if child == 0:
            for call in (
                lambda: writer.submit(record(-1)),
                lambda: writer.write_text("x", ""),
                writer.raise_pending,
                writer.flush,
            ):
                try:
                    call()
                except RuntimeError as error:
                    assert "forked" in str(error)
                else:
                    os._exit(1)
            writer.close()
            del writer
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
writer.close()
"""
    done = interpreters.run(SCRIPT + script, tmp_path, warns=False)
    assert (done.returncode, done.stderr) == (0, "")
    with open_run(tmp_path) as run:
        assert run.series("k/19")[1].tolist() == [step + 19.0 for step in range(100)]
    assert names(tmp_path) == ["metrics-001.h5", "run.json"]


WRITES_SOME = """
from tmm.core.records import Event

folder, first = sys.argv[1], int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
with RunWriter(folder, info={"id": "x"}) as writer:
    for step in range(first, first + 50):
        writer.submit(record(step))
        writer.submit(StepRecord(step, events=(Event(step, "note", str(first)),)))
"""


def test_processes_that_open_one_run_at_once_get_segments_of_their_own(tmp_path, interpreters):
    firsts = [100 * i for i in range(4)]
    processes = [interpreters.start(SCRIPT + WRITES_SOME, tmp_path, first) for first in firsts]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.wait() == 0
        process.close()
    assert len(segment_paths(tmp_path)) == 4
    assert json.loads((tmp_path / "run.json").read_text())["id"] == "x"
    assert len(read_info(tmp_path)["starts"]) == 4
    steps = [step for first in firsts for step in range(first, first + 50)]
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == steps
        assert run.series("k/1")[1].tolist() == [step + 1.0 for step in steps]
        assert sorted(event.step for event in run.events) == steps
    assert not [name for name in names(tmp_path) if name.startswith(".")]
