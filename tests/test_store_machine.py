"""The store as a state machine: write, kill, resume, go back, read live; a dict is the oracle."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.test_reader import exact, record
from tmm.runs.recorded_run import Run, open_run
from tmm.runtime.store.run_writer import RunWriter

LONG = 60.0

keys = st.sampled_from(["a", "b", "loss", "x/y z"])
numbers = st.floats(allow_nan=True) | st.sampled_from([0.0, -0.0, math.inf])
steps = st.integers(0, 12)
Values = dict[str, float]


class Store(RuleBasedStateMachine):
    """One folder after the other: a killed process leaves the bytes that it has flushed so far."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.path = self.root / "0"
        self.kills = 0
        self.recorded: dict[int, Values] = {}
        self.writer: RunWriter | None = None
        self.replaces_from: int | None = None
        self.abandoned: list[RunWriter] = []
        self.reader: Run | None = None

    @initialize()
    def begin(self) -> None:
        self.writer = RunWriter(self.path, info={"id": "x"})

    def _take(self, step: int, values: Values) -> None:
        if (first := self.replaces_from) is not None:  # only what is new takes the old away
            self.recorded = {at: known for at, known in self.recorded.items() if at < first}
            self.replaces_from = None
        self.recorded[step] = values

    @precondition(lambda self: self.writer is not None)
    @rule(step=steps, values=st.dictionaries(keys, numbers, min_size=1))
    def write(self, step: int, values: Values) -> None:
        assert self.writer is not None
        assert self.writer.submit(record(step, values), wait_seconds=LONG)
        self._take(step, values)

    @precondition(lambda self: self.writer is not None)
    @rule(batch=st.lists(st.tuples(steps, st.dictionaries(keys, numbers, min_size=1)), max_size=5))
    def write_without_waiting(self, batch: list[tuple[int, Values]]) -> None:
        assert self.writer is not None
        for step, values in batch:
            self.writer.submit(record(step, values))
            self._take(step, values)
        self.writer.flush()

    @precondition(lambda self: self.writer is not None)
    @rule()
    def close(self) -> None:
        assert self.writer is not None
        self.writer.close()
        self.writer = self.replaces_from = None

    @precondition(lambda self: self.writer is not None)
    @rule()
    def kill(self) -> None:
        assert self.writer is not None
        self.kills += 1
        left = self.root / str(self.kills)
        shutil.copytree(self.path, left)
        self.abandoned.append(self.writer)
        self.writer, self.path, self.replaces_from = None, left, None
        self._forget_reader()

    @precondition(lambda self: self.writer is None)
    @rule(back_to=st.none() | steps)
    def resume(self, back_to: int | None) -> None:
        self.writer = RunWriter(self.path, info={"id": "x"}, replaces_from=back_to)
        self.replaces_from = back_to

    @rule()
    def open_for_reading(self) -> None:
        self._forget_reader()
        self.reader = open_run(self.path)

    @invariant()
    def everything_that_was_flushed_is_read(self) -> None:
        if not self.path.exists():
            return
        with open_run(self.path) as fresh:
            for run in (fresh, self.reader):
                if run is not None:
                    self._compare(run)

    def _compare(self, run: Run) -> None:
        assert run.steps.tolist() == sorted(self.recorded)
        for step, values in self.recorded.items():
            found = run.at(step)
            assert {key: exact(found[key]) for key in found} == {
                key: exact(values[key]) for key in values
            }
        for key in {key for values in self.recorded.values() for key in values}:
            at, series = run.series(key)
            assert at.tolist() == [s for s in sorted(self.recorded) if key in self.recorded[s]]
            assert exact(series) == exact([self.recorded[s][key] for s in at.tolist()])

    def _forget_reader(self) -> None:
        if self.reader is not None:
            self.reader.close()
        self.reader = None

    def teardown(self) -> None:
        self._forget_reader()
        for writer in (self.writer, *self.abandoned):
            if writer is not None:
                writer.close()
        shutil.rmtree(self.root)


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
