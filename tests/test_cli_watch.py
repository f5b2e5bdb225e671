"""``tmm watch``, in a real terminal, beside processes that record, end and are killed."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import shutil
import signal
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

import tmm
from tests.interpreters import Interpreters
from tmm.cli import app
from tmm.cli.sparkline import sparkline
from tmm.cli.terminal import clean
from tmm.cli.watch_frame import draw, duration, lines_for_keys
from tmm.core.keys import info_of
from tmm.core.records import Event, KeyInfo, StepRecord, Table
from tmm.runs.state import State
from tmm.runtime.store.segment_writer import SegmentWriter
from tmm.views.live.choice import choose_keys
from tmm.views.live.held_run import Extent, HeldRun, KnownSeries, SeriesCache
from tmm.views.live.judge import Findings, Judge, judged
from tmm.views.live.live_snapshot import Follower, standing
from tmm.views.live.rates import RATE_KEYS, recorded_rates

LONG = 60
SIZES = ((24, 80), (15, 60))  # rows and columns of terminals

ENTER_SCREEN, LEAVE_SCREEN = "\x1b[?1049h", "\x1b[?1049l"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"
HOME = "\x1b[H"

WRITER = """
import sys, tmm
root, steps = sys.argv[1], int(sys.argv[2])
with tmm.start_run("p", "a run", root=root, system_seconds=None) as run:
    print(run.path, flush=True)
    for step in range(steps):
        if step % 40 == 0:
            sys.stdin.readline()  # goes on when told, at first without a step
        values = {"loss": 4.0 / (step + 1), "accuracy": step / 1000}
        if step >= 10:
            values["late/loss"] = float("nan") if step == 12 else 1.0
        run.log(values)
        run.step(tokens=100)
    sys.stdin.readline()
"""


class Writer:
    """A process that records a run."""

    def __init__(self, interpreters: Interpreters, root: Path, steps: int) -> None:
        self.process = interpreters.start(WRITER, root, steps)
        self.path = Path(self.process.stdout.readline().strip())

    def go_on(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()


Start = Callable[[int], Writer]


@pytest.fixture
def start(interpreters: Interpreters, tmp_path: Path) -> Iterator[Start]:
    writers: list[Writer] = []

    def begin(steps: int) -> Writer:
        writers.append(Writer(interpreters, tmp_path / "runs", steps))
        return writers[-1]

    yield begin
    for writer in writers:
        writer.process.close()


AS_A_MODULE = 'import runpy; runpy.run_module("tmm", run_name="__main__", alter_sys=True)'


class Terminal:
    """``tmm watch`` in a terminal of ``rows`` lines and ``columns`` cells."""

    def __init__(
        self, interpreters: Interpreters, run: Path, rows: int, columns: int, *arguments: str
    ) -> None:
        pytest.importorskip("pexpect", reason="needs pseudo-terminals")
        from pexpect import fdpexpect

        hidden = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"}
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self.master, theirs = os.openpty()
        self.resize(rows, columns)
        command = ("watch", run, "--every", "0.1", *arguments)
        self.process = interpreters.start(
            AS_A_MODULE,
            *command,
            environment={**environment, "TERM": "xterm-256color"},
            terminal=theirs,
        )
        os.close(theirs)
        self.child = fdpexpect.fdspawn(
            self.master,
            encoding="utf-8",
            codec_errors="replace",  # a terminal drops what is on its way when it gets Ctrl-C
            timeout=LONG,
        )
        self.output = ""

    def resize(self, rows: int, columns: int) -> None:
        termios.tcsetwinsize(self.master, (rows, columns))

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.write(self.master, b"\x03")

    def sees(self, pattern: str) -> re.Match[str]:
        """Wait for ``pattern`` in what is shown from now on."""
        self.child.expect(pattern)
        self.output += self.child.before + self.child.after
        match: re.Match[str] = self.child.match
        return match

    def status(self) -> int:
        """Wait for the end; the exit status."""
        import pexpect

        self.child.expect(pexpect.EOF)
        self.output += self.child.before
        status = self.process.wait(LONG)  # closing at once hangs up on one that is still ending
        self.close()
        return status

    def close(self) -> None:
        self.process.close()
        self.child.close()

    def final(self) -> str:
        """What stays on the screen."""
        return plain(self.output.rpartition(LEAVE_SCREEN)[2])

    def is_restored(self) -> bool:
        """Whether the cursor is shown and the screen is the one from before."""
        text = self.output
        return text.count(ENTER_SCREEN) == text.count(LEAVE_SCREEN) == 1 and text.rfind(
            SHOW_CURSOR
        ) > text.rfind(HIDE_CURSOR)


Watch = Callable[..., Terminal]


@pytest.fixture
def watch(interpreters: Interpreters) -> Iterator[Watch]:
    terminals: list[Terminal] = []

    def begin(run: Path, rows: int, columns: int, *arguments: str) -> Terminal:
        terminals.append(Terminal(interpreters, run, rows, columns, *arguments))
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.close()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "")


def frames(output: str) -> list[list[str]]:
    """The lines of the frames that were drawn on the screen of the watcher."""
    screen = output.partition(ENTER_SCREEN)[2].partition(LEAVE_SCREEN)[0]
    return [plain(frame).split("\n") for frame in screen.split(HOME)[2:-1]]


def values_of(path: Path) -> dict[str, list[float]]:
    with tmm.open_run(path) as run:
        keys = [key for key in run.keys(None) if not key.startswith("system/")]
        return {key: run.series(key)[1].tolist() for key in keys}


def test_a_run_is_followed_until_it_ends(start: Start, watch: Watch) -> None:
    writer, undisturbed = start(80), start(80)
    terminals = [watch(writer.path, rows, columns) for rows, columns in SIZES]
    for terminal in terminals:
        terminal.sees("no step yet")
        terminal.sees("nothing recorded yet")
    writer.go_on()
    for terminal in terminals:
        terminal.sees("step 39")
        terminal.sees(r"[\d,]+ tokens/s")
        terminal.sees("late/loss")
    writer.go_on()
    for terminal in terminals:
        terminal.sees("step 79")
        terminal.sees("1 critical")
    for process in (writer, undisturbed, undisturbed, undisturbed):
        process.go_on()
    for terminal, (rows, columns) in zip(terminals, SIZES, strict=True):
        assert terminal.status() == 0
        assert terminal.is_restored()
        assert re.search(r"finished after \d:\d\d:\d\d", terminal.final())
        assert re.search(r"loss +0\.05 +█", terminal.final())
        assert re.search(r"late/loss +1 +▅*!▅+", terminal.final())
        assert re.search(r"critical +12  NaN at step 12", terminal.final())
        drawn = frames(terminal.output)
        assert len(drawn) >= 3
        for frame in drawn:
            assert len(frame) == rows
            assert max(map(cell_len, frame)) <= columns
    assert writer.process.wait(LONG) == undisturbed.process.wait(LONG) == 0
    found, expected = values_of(writer.path), values_of(undisturbed.path)
    assert found.keys() == expected.keys() == {"loss", "accuracy", "late/loss"}
    for key in found:
        np.testing.assert_array_equal(found[key], expected[key])


def test_a_killed_process_is_said_to_have_crashed(start: Start, watch: Watch) -> None:
    writer = start(1000)
    writer.go_on()
    terminal = watch(writer.path, 24, 80, "-m", "loss")
    terminal.sees("step 39")
    writer.process.send_signal(signal.SIGKILL)
    assert terminal.status() == 0
    assert terminal.is_restored()
    assert "crashed" in terminal.final()
    assert "its process is gone" in terminal.final()
    assert "accuracy" not in plain(terminal.output)
    assert "step 39  its process" in terminal.final()


def test_leaving_leaves_the_training_alone(start: Start, watch: Watch) -> None:
    writer = start(60)
    terminal, other = watch(writer.path, 24, 80), watch(writer.path, 24, 80)
    writer.go_on()
    terminal.sees(r"step \d+")
    terminal.resize(12, 50)
    wait_until(lambda: terminal.sees("step 39") and len(frames(terminal.output)[-1]) == 12)
    terminal.interrupt()
    assert terminal.status() == 128 + signal.SIGINT
    other.sees(r"step \d+")
    other.process.send_signal(signal.SIGTERM)
    assert other.status() == 128 + signal.SIGTERM
    for left in (terminal, other):
        assert left.is_restored()
        assert "Traceback" not in left.output
        assert re.search(r"step \d+", left.final())
    assert max(map(cell_len, frames(terminal.output)[-1])) <= 50
    writer.go_on()
    writer.go_on()
    assert writer.process.wait(LONG) == 0
    with tmm.open_run(writer.path) as run:
        assert run.steps.tolist() == list(range(60))


def test_a_run_that_is_deleted_while_it_is_watched(start: Start, watch: Watch) -> None:
    writer = start(1000)
    writer.go_on()
    terminal = watch(writer.path, 24, 80)
    terminal.sees(r"step \d+")
    shutil.rmtree(writer.path)
    assert terminal.status() == 1
    assert terminal.is_restored()
    assert f"the run {writer.path.name} was deleted" in terminal.final()


# One frame


@pytest.fixture
def once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("TMM_ROOT", str(tmp_path / "runs"))

    def run(*arguments: str, size: tuple[int, int] = (24, 80), status: int = 0) -> Result:
        monkeypatch.setenv("LINES", str(size[0]))
        monkeypatch.setenv("COLUMNS", str(size[1]))
        result = CliRunner().invoke(app, ["watch", *arguments])
        assert result.exit_code == status, result.output
        return result

    return run


def record(root: Path, name: str | None, values: list[dict[str, object]]) -> tmm.LiveRun:
    with tmm.start_run("p", name, root=root / "runs", system_seconds=None) as run:
        for step_values in values:
            run.log(step_values)
            run.step()
    return run


def test_one_frame(once: Callable[..., Result], tmp_path: Path) -> None:
    once(status=1)
    steps: list[dict[str, object]] = [{"loss": 16.0 - n, "a/inf": n} for n in range(16)]
    steps[15] |= {"a/inf": -math.inf, "a/loss": math.nan}
    steps[14] |= {"a/loss": 3.0}
    run = record(tmp_path, "tiny", steps)
    lines = once("tiny").stdout.splitlines()
    assert lines[0].startswith(f"tiny  {run.id}  ")
    assert re.search(r"  finished after \d:\d\d:\d\d$", lines[0])
    assert cell_len(lines[0]) == 80
    assert lines[1] == "step 15"
    assert lines[3].split() == ["key", "newest", "first", "to", "last"]
    shown = {line.split()[0]: line.split()[1:] for line in lines[4:8]}
    assert shown["loss"] == ["1", sparkline(np.arange(16.0, 0, -1), 100)]
    assert shown["a/loss"] == ["nan", "▅!"]
    assert shown["a/inf"] == ["-inf", sparkline(np.arange(15.0), 100) + "!"]
    assert "step_seconds" in lines[7]
    assert "critical" in lines[9]
    assert re.match(r"critical +15  ", lines[10])
    assert once("tiny").stdout == once().stdout  # the newest
    found = json.loads(once("tiny", "--json").stdout)
    assert (found["id"], found["status"], found["last_step"]) == (run.id, "finished", 15)
    values = {key["key"]: (key["step"], key["value"], key["severity"]) for key in found["keys"]}
    assert values["loss"] == (15, 1.0, None)
    assert values["a/loss"] == (15, "NaN", "critical")
    assert found["anomalies"][0]["key"] == "a/loss"
    assert "no run 'x'" in once("x", status=1).output
    assert "not a regular expression" in once("-m", "(", status=1).output


def test_patterns_choose_keys(once: Callable[..., Result], tmp_path: Path) -> None:
    record(tmp_path, "one", [{"loss": 1.0, "b/loss": 2.0, "accuracy": 3.0}])
    text = once("one", "-m", "acc", "-m", "b/").stdout
    assert "accuracy" in text
    assert "b/loss" in text
    assert "\nloss" not in text
    assert "2 of 3 keys" in text
    assert "no such key yet" in once("one", "-m", "none").stdout


def test_wide_terminals_show_ranges_and_narrow_ones_fit(
    once: Callable[..., Result], tmp_path: Path
) -> None:
    values: list[dict[str, object]] = [
        {"loss": 1.0 + n, "train/a/very/long/name/of/a/value": n} for n in range(100)
    ]
    record(tmp_path, "\u6f22\u5b57 " * 20, values)
    wide = once(size=(40, 160)).stdout.splitlines()
    (loss,) = [line for line in wide if line.startswith("loss")]
    assert loss.split()[1:4] == ["100", "1", "100"]
    assert cell_len(loss) == 160
    for rows in (3, 5, 8, 15, 24):
        for columns in (10, 30, 60, 79, 100):
            lines = once(size=(rows, columns)).stdout.splitlines()
            assert len(lines) <= rows - 1
            assert max(map(cell_len, lines)) <= columns
    assert "train…of/a/value" in once(size=(15, 36)).stdout


ODD = "[red]x[/] \x1b[31m\x1b]0;title\x07 \x9b2J \u202e \ud800 \r\n\t[/nothing]"


def test_odd_texts_are_harmless(once: Callable[..., Result], tmp_path: Path) -> None:
    values = [{"loss": 1.0, f"{ODD}/loss": value} for value in (1.0, math.nan)]
    record(tmp_path, ODD, values)
    text = once(size=(24, 160)).stdout
    assert text.startswith("[red]x[/] \ufffd[31m\ufffd]0;title\ufffd \ufffd2J")
    assert all(character.isprintable() or character == "\n" for character in text)
    assert "critical" in text
    assert clean("two\nlines") == "two lines"
    assert clean("a\u6f22 \u00fc") == "a\u6f22 \u00fc"


# What is shown


def infos(*keys: str) -> tuple[KeyInfo, ...]:
    return tuple(info_of(key, position) for position, key in enumerate(keys))


MODEL = [
    f"{family}/h.{layer}{suffix}"
    for layer in range(100)
    for family, suffix in (
        ("activation", "/rms"),
        ("activation", "/nan_count"),
        ("gradient", ".weight/norm"),
    )
]


def test_the_choice_of_keys() -> None:
    logged = [f"logged_{n}" for n in range(20)]
    known = infos("system/gpu_0/memory", "system/cpu_percent", *MODEL, *logged, "kl_loss", "loss")
    bad = ["activation/h.70/rms", "loss", "gone"]
    chosen = choose_keys(known, 12, bad)
    assert chosen[:4] == ["loss", "kl_loss", "logged_0", "logged_1"]
    assert chosen[4:] == [
        "activation/h.70/rms",
        *("gradient/h.0.weight/norm", "gradient/h.49.weight/norm", "gradient/h.99.weight/norm"),
        *("activation/h.0/rms", "activation/h.99/rms"),
        *("system/gpu_0/memory", "system/cpu_percent"),
    ]
    for lines in (1, 2, 3, 50, 1000):
        chosen = choose_keys(known, lines, bad)
        assert len(chosen) == len(set(chosen)) == min(lines, len(known))
        assert chosen[0] == "loss"
    assert choose_keys(infos("loss", "system/x"), 5, ()) == ["loss", "system/x"]
    assert choose_keys((), 5, ()) == []


def test_rates_are_those_of_the_time_that_steps_took() -> None:
    seconds, tokens = np.array([1.0, 3.0, 2.0, 2.0]), np.array([10.0, 60.0, 0.0, 30.0])

    def known(steps: list[int], values: np.ndarray) -> KnownSeries:
        return KnownSeries(np.array(steps), values, Extent())

    step_key, _, tokens_key = RATE_KEYS
    series = {
        step_key: known([4, 5, 6, 7], seconds),
        tokens_key: known([5, 7], (tokens / seconds)[1::2]),
    }
    rates = recorded_rates(series)
    assert rates == {"steps": pytest.approx(4 / 8), "tokens": pytest.approx(90 / 5)}
    series[step_key] = known([4, 5, 7, 8], seconds)  # some were not recorded
    assert recorded_rates(series).keys() == {"tokens"}
    assert recorded_rates({}) == {}


def test_a_run_of_tmm_instrument_alone_goes_by_its_process(
    tmp_path: Path, interpreters: Interpreters
) -> None:
    ended = interpreters.run("import os; print(os.getpid())")
    now = datetime.now(UTC).isoformat()
    for process, host, status, is_over in (
        (os.getpid(), platform.node(), "alive", False),
        (int(ended.stdout), platform.node(), "gone", True),
        (os.getpid(), "elsewhere", "unknown", False),
    ):
        starts = [{"time": now, "host": host, "process": process}]
        found = standing(tmp_path, {"starts": starts})
        assert (found.status, found.is_over) == (status, is_over)
    assert standing(tmp_path, {}).status == "unknown"


def test_a_run_that_ends_while_it_is_looked_at_has_not_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = State.begin().end("finished", "", 1)
    answers = [replace(finished, status="crashed"), finished]
    monkeypatch.setattr(State, "read", lambda path: answers.pop(0))
    assert standing(tmp_path, {}).status == "finished"


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 4))]
)
def test_what_is_kept_of_series_is_what_the_run_says(tmp_path: Path, seed: int) -> None:
    random = np.random.default_rng(seed)
    (tmp_path / "run.json").write_text("{}")
    keys = infos(*(f"k/{n}" for n in range(6)))
    edges = np.arange(4.0)
    writer: SegmentWriter | None = None
    step = 0
    with HeldRun(tmp_path) as held, tmm.open_run(tmp_path) as run:
        cache = SeriesCache(held)
        for _ in range(60):
            if writer is None or random.random() < 0.05:  # another process goes on with it
                writer = SegmentWriter(tmp_path, keys=6, bins=3, histogram_edges=edges)
            for _ in range(random.integers(0, 3) if random.random() < 0.95 else 80):
                step += 1 if random.random() < 0.95 else -min(step, 3)
                some = tuple(info for info in keys if random.random() < 0.7)
                values = random.standard_normal(len(some))
                values[random.random(len(some)) < 0.1] = np.nan
                bins = Table(infos("h/0"), random.random((1, 3)))
                writer.write(StepRecord(step, (Table(some, values),), (bins,)))
            held.catch_up()
            found = cache.read(held.keys())
            assert set(found) == set(run.keys())
            for key, known in found.items():
                steps, expected = run.series(key)
                kept = slice(-1, None) if known.is_histogram else slice(None)
                np.testing.assert_array_equal(known.steps, steps[kept])
                np.testing.assert_array_equal(known.values, expected[kept])
        assert writer is not None
        writer.close()


def test_only_new_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.json").write_text("{}")
    writer = SegmentWriter(tmp_path, keys=1)
    writer.write(StepRecord(0, (Table(infos("k/a"), np.array([1.0])),)))
    with HeldRun(tmp_path) as run:
        cache = SeriesCache(run)
        cache.read(["k/a"])
        monkeypatch.setattr(HeldRun, "series", None)  # no whole series from now on
        for step in range(1, 5):
            writer.write(StepRecord(step, (Table(infos("k/a"), np.array([1.0 + step])),)))
            assert cache.read(["k/a"])["k/a"].values.tolist() == list(range(1, step + 1))
            run.catch_up()
            assert cache.read(["k/a"])["k/a"].values.tolist() == list(range(1, step + 2))
    writer.close()


def test_a_detector_that_fails_is_named(tmp_path: Path) -> None:
    run = record(tmp_path, "one", [{"loss": math.nan}])

    def failing(recorded: object) -> Iterator[tmm.analysis.Anomaly]:
        raise RuntimeError("no\x1b[31m")
        yield

    with HeldRun(run.path) as held:
        findings = judged(held, (("mine", failing),))
    assert findings.failures == ("mine: RuntimeError: no\x1b[31m",)
    follower = Follower(run.path)
    console = Console(width=80, record=True)
    console.print(draw(follower.snapshot(10, findings), 80, 24))
    follower.run.close()
    assert "detector mine: RuntimeError: no\ufffd[31m" in console.export_text()


def test_the_newest_event_is_shown(tmp_path: Path, once: Callable[..., Result]) -> None:
    run = record(tmp_path, "one", [{"loss": 1.0}])
    writer = SegmentWriter(run.path, keys=1)
    for text in ("old", "new\x1b"):
        writer.write(StepRecord(7, events=(Event(7, "gap", text),)))
    writer.close()
    assert "event at step 7: new\ufffd\n" in once("one").stdout
    assert "step 0\n" in once("one").stdout  # it is no recorded step


def test_the_judge_follows_a_run_and_stops_at_once(tmp_path: Path) -> None:
    with tmm.start_run("p", root=tmp_path, system_seconds=None) as run:
        run.log({"loss": 1.0})
        run.step()
        inside, free = threading.Event(), threading.Event()

        def thorough(recorded: tmm.analysis.Recorded) -> Iterator[tmm.analysis.Anomaly]:
            yield from ()
            if len(recorded.steps) > 1:
                inside.set()
                free.wait(LONG)
                recorded.series("loss")

        with Judge(run.path, (("thorough", thorough),)) as judge:
            wait_until(lambda: judge.findings.last_step == 0)
            run.log({"loss": 1.0})
            run.step()
            assert inside.wait(LONG)
            began = time.monotonic()
        assert time.monotonic() - began < LONG / 2
        free.set()
        wait_until(lambda: "tmm watch" not in {thread.name for thread in threading.enumerate()})


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_durations_and_room() -> None:
    assert [duration(s) for s in (0, 61.9, 3600, 90061)] == [
        *("0:00:00", "0:01:01", "1:00:00", "1d 1:01:01"),
    ]
    assert lines_for_keys(1, 5) == 1
    assert lines_for_keys(15, 0) == 12
    assert Findings().extent is None


def test_a_peak_is_seen_in_a_long_sparkline() -> None:
    values = np.zeros(10_000)
    values[5_000] = 1.0
    assert sparkline(values, 5) == "▁▁█▁▁"
    assert sparkline(np.full(401, 0.1), 76) == "▅" * 76
    assert sparkline(np.array([1e308, -1e308, 1e308, 1e308]), 2) == "▁█"
    assert sparkline(np.array([math.inf, -math.inf, 1.0, 2.0]), 2) == "!▅"
