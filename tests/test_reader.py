import inspect
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmm.core.records import Event, KeyInfo, StepRecord, Table
from tmm.runs.recorded_run import open_run
from tmm.runtime.store.run_writer import RunWriter
from tmm.runtime.store.segment_writer import SegmentWriter

BINS = 4
LONG = 60.0


def info(key, position=0, notes=""):
    return KeyInfo(key, key.partition("/")[0], key, position, "mean", notes)


def record(step, values=(), histograms=(), events=()):
    """A record of ``{key: number}`` and ``{key: [numbers]}``; no tables for what is empty."""
    tables = [
        (Table(tuple(map(info, part)), np.array(list(part.values()), dtype=np.float64)),)
        if part
        else ()
        for part in (values, histograms)
    ]
    return StepRecord(step, *tables, tuple(events))


def write(folder, *segments):
    """A run of which each list of records is a segment."""
    for records in segments:
        with RunWriter(folder, info={"id": "x"}) as writer:
            for one in records:
                writer.submit(one)


def exact(value):
    """Something that is equal only for the same numbers, bit by bit, but for the kind of NaN."""
    numbers = np.asarray(value, dtype=np.float64).ravel().tolist()
    return ["nan" if math.isnan(number) else number.hex() for number in numbers]


any_key = st.text(st.characters(), max_size=8) | st.sampled_from(["a/b c", "\n", "x/" * 5000])
any_step = st.integers(-3, 6) | st.integers(-(2**63), 2**63 - 1)


@st.composite
def any_segments(draw):
    keys = draw(st.lists(any_key, unique=True, min_size=2, max_size=6))
    split = draw(st.integers(1, len(keys) - 1))
    numbers = st.dictionaries(st.sampled_from(keys[:split]), st.floats())
    bins = st.lists(st.floats(), min_size=BINS, max_size=BINS)
    histograms = st.dictionaries(st.sampled_from(keys[split:]), bins)
    events = st.lists(st.builds(Event, any_step, st.just("gap"), any_key), max_size=1)
    records = st.builds(record, any_step, numbers, histograms, events)
    return draw(st.lists(st.lists(records, max_size=15), max_size=4))


@settings(deadline=None)
@given(any_segments(), st.data())
def test_a_run_is_what_a_dict_would_be(segments, data):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, [], *segments)
        model, events, seen = {}, [], {}
        for one in (one for records in segments for one in records):
            events += one.events
            tables = one.scalars + one.histograms
            if tables:
                model[one.step] = {
                    known.key: value
                    for table in tables
                    for known, value in zip(table.infos, table.values, strict=True)
                }
                seen |= dict.fromkeys(model[one.step])
        with open_run(folder) as run:
            assert run.events == events
            assert run.steps.tolist() == sorted(model)
            assert run.steps.dtype == np.int64
            assert sorted(run.keys()) == sorted(seen)
            for step, expected in model.items():
                found = run.at(step)
                assert {key: exact(found[key]) for key in found} == {
                    key: exact(expected[key]) for key in expected
                }
            for key in seen:
                steps, values = run.series(key)
                assert steps.tolist() == [step for step in sorted(model) if key in model[step]]
                assert exact(values) == exact([model[step][key] for step in steps.tolist()])
                assert (
                    values.ndim == 1 + np.ndim(run.at(steps.tolist()[0])[key]) if len(steps) else 1
                )


def test_keys_are_in_the_order_of_execution_and_then_of_appearance(tmp_path):
    infos = (info("late", 5), info("b", 1), info("a", 1), info("first", 0))
    with RunWriter(tmp_path, info={}) as writer:
        writer.submit(StepRecord(0, (Table(infos, np.zeros(4)),)))
        histograms = (info("between", 3), info("h", 1))
        writer.submit(StepRecord(1, (), (Table(histograms, np.zeros((2, 3))),)))
    with open_run(tmp_path) as run:
        assert run.keys() == ["first", "b", "a", "h", "between", "late"]
        assert list(run.at(0)) == ["first", "b", "a", "late"]
        assert run.keys("b") == ["b", "between"]
        assert run.keys(r".*t$") == ["first"]
        assert run.keys("irst") == []  # `re.match`, not `re.search`
        with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
            run.keys("(")


def test_the_newest_segment_says_what_a_key_is(tmp_path):
    for position, notes in ((1, "old"), (2, "new")):
        with RunWriter(tmp_path, info={}) as writer:
            writer.submit(StepRecord(0, (Table((info("a", position, notes),), np.zeros(1)),)))
    with open_run(tmp_path) as run:
        assert run.key_info("a") == info("a", 2, "new")


def test_a_step_recorded_again_is_replaced_as_a_whole(tmp_path):
    write(
        tmp_path,
        [record(1, {"a": 1.0, "b": 1.0}), record(2, {"a": 2.0}), record(1, {"a": 10.0})],
        [record(2, {"b": 20.0}), record(2, events=[Event(2, "gap", "no tables, no step")])],
    )
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == [1, 2]
        assert (run.at(1), run.at(2)) == ({"a": 10.0}, {"b": 20.0})
        assert [part.tolist() for part in run.series("a")] == [[1], [10.0]]
        assert [part.tolist() for part in run.series("b")] == [[2], [20.0]]


def test_a_later_segment_wins_even_where_it_was_opened_by_an_older_process(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    first, second = SegmentWriter(tmp_path, keys=1), SegmentWriter(tmp_path, keys=1)
    second.write(record(1, {"a": 2.0}))
    with open_run(tmp_path) as run:
        first.write(record(1, {"a": 1.0}))
        first.write(record(0, {"a": 0.0}))
        assert run.series("a")[1].tolist() == [0.0, 2.0]
    first.close()
    second.close()


def test_not_measured_differs_from_nan(tmp_path):
    write(tmp_path, [record(0, {"a": math.nan, "b": 1.0}), record(1, {"b": 2.0})])
    with open_run(tmp_path) as run:
        assert run.series("a")[0].tolist() == [0]
        assert np.isnan(run.series("a")[1]).tolist() == [True]
        assert list(run.at(0)) == ["a", "b"]
        assert list(run.at(1)) == ["b"]


def test_an_empty_run_works(tmp_path):
    write(tmp_path, [])
    with open_run(str(tmp_path)) as run:
        assert run.path == tmp_path
        assert run.info["id"] == "x"
        assert (run.steps.tolist(), run.keys(), run.events) == ([], [], [])
        assert run.histogram_edges is None
        with pytest.raises(KeyError, match="a"):
            run.series("a")
        with pytest.raises(KeyError, match="0"):
            run.at(0)
        with pytest.raises(FileNotFoundError, match=r"explain\.txt"):
            run.text("explain.txt")


def test_errors_name_what_is_nearest(tmp_path):
    write(tmp_path, [record(step, {"activation/fc1/rms": 1.0}) for step in (10, 20, 30)])
    with open_run(tmp_path) as run:
        for call in (run.series, run.key_info):
            with pytest.raises(KeyError, match="activation/fc1/rms"):
                call("activation/fc/rms")
        for step in (11, 2**70, -(2**70)):
            with pytest.raises(KeyError, match=r"nearest: \[.*\d0.*\]"):
                run.at(step)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected .*run\.json.*metrics-NNN\.h5"):
        open_run(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_run(tmp_path / "file")
    with pytest.raises(ValueError, match=r"no run\.json"):
        open_run(tmp_path)


def test_a_damaged_segment_is_named_and_unfinished_files_are_ignored(tmp_path):
    write(tmp_path, [record(0, {"a": 1.0})])
    (tmp_path / ".metrics-002.h5.partial").write_bytes(b"not yet")
    with open_run(tmp_path) as run:
        assert run.steps.tolist() == [0]
        (tmp_path / "metrics-002.h5").write_bytes(b"garbage")
        for _ in range(2):
            with pytest.raises(ValueError, match=r"metrics-002\.h5"):
                run.series("a")
        (tmp_path / "metrics-002.h5").unlink()
        assert run.series("a")[1].tolist() == [1.0]
    (tmp_path / "metrics-003.h5").write_bytes(b"")
    with pytest.raises(ValueError, match=r"metrics-003\.h5"):
        open_run(tmp_path)


def test_segments_that_disagree_about_a_key_are_read_by_step(tmp_path):
    write(
        tmp_path,
        [record(0, {"a": 1.0}, {"h": [1.0, 2.0]})],
        [record(1, {"h": 3.0}, {"a": [1.0]})],
    )
    with open_run(tmp_path) as run:
        for key in ("a", "h"):
            with pytest.raises(ValueError, match=f"'{key}'"):
                run.series(key)
        assert run.at(0)["a"] == 1.0
        assert run.at(1)["a"].tolist() == [1.0]


def test_texts_are_listed_where_one_is_missing(tmp_path):
    with RunWriter(tmp_path, info={}) as writer:
        writer.write_text("explain.txt", "all of it")
    with open_run(tmp_path) as run:
        assert run.text("explain.txt") == "all of it"
        for name in ("other", "../run.json", ""):
            with pytest.raises(FileNotFoundError, match=r"explain\.txt"):
                run.text(name)


def test_what_is_returned_is_the_callers(tmp_path):
    write(tmp_path, [record(0, {"a": 1.0})])
    with open_run(tmp_path) as run:
        run.steps[:] = 7
        run.series("a")[0][:] = 7
        assert run.steps.tolist() == [0]


def test_a_closed_run_says_so(tmp_path):
    write(tmp_path, [record(0, {"a": 1.0})])
    run = open_run(tmp_path)
    run.close()
    run.close()
    with pytest.raises(ValueError, match="closed"):
        _ = run.steps


def test_every_access_sees_what_came_since(tmp_path):
    write(tmp_path, [])
    with open_run(tmp_path) as run, RunWriter(tmp_path, info={}) as writer:
        for step in range(100):
            key = f"k{step // 10}"
            one = record(
                step, {"a": float(step), key: -1.0}, {"h": [1.0, step]} if step % 2 else ()
            )
            assert writer.submit(one, wait_seconds=LONG)
            match step % 5:
                case 0:
                    assert run.steps.tolist() == list(range(step + 1))
                case 1:
                    assert run.series("a")[1].tolist() == list(range(step + 1))
                case 2:
                    assert run.at(step) == {"a": step, key: -1.0} | (
                        {"h": pytest.approx([1.0, step])} if step % 2 else {}
                    )
                case 3:
                    assert run.keys("k")[-1] == key
                case 4:
                    assert len(run.series(key)[0]) == step % 10 + 1


STEPS = 400


def expected_values(step):
    """The keys grow; each is missing in every third step."""
    keys = range(30 + step // 4)
    return {f"key/{i}": step + i / 1024 for i in keys if (i + step) % 3}


def write_live(path, first):
    with RunWriter(path, info={}) as writer:
        for step in range(first, first + STEPS):
            gap = [Event(step, "gap", "x")] if step % 10 == 0 else ()
            histograms = {"h": [step, math.nan, math.inf]} if step % 7 == 0 else ()
            writer.submit(record(step, expected_values(step), histograms, gap))


WRITER = f"""
import math, sys
import numpy as np
from tmm.core.records import Event, KeyInfo, StepRecord, Table
from tmm.runtime.store.run_writer import RunWriter
STEPS = {STEPS}
{"".join(map(inspect.getsource, (info, record, expected_values, write_live)))}
write_live(sys.argv[1], int(sys.argv[2]))
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_other_processes_write_while_this_one_reads(tmp_path, processes, interpreters):
    write(tmp_path, [])
    random = np.random.default_rng(0)
    with open_run(tmp_path) as run:
        writers = [interpreters.start(WRITER, tmp_path, STEPS * i) for i in range(processes)]
        known: set[int] = set()
        lengths = set()
        while any(writer.poll() is None for writer in writers):
            steps = set(run.steps.tolist())
            assert known <= steps
            known = steps
            lengths.add(len(steps))
            for step in {max(steps), int(random.choice(sorted(steps)))} if steps else ():
                found = run.at(step)
                found.pop("h", None)
                assert found == expected_values(step)
            if any(step % 3 for step in steps):
                at, values = run.series("key/3")
                assert values.tolist() == [expected_values(s)["key/3"] for s in at.tolist()]
                assert {step for step in steps if step % 3} <= set(at.tolist())
        assert [writer.wait() for writer in writers] == [0] * processes
        for writer in writers:
            writer.close()
        assert len(lengths) > 3  # it did read in between
        total = range(STEPS * processes)
        assert run.steps.tolist() == list(total)
        assert all(run.at(step).items() >= expected_values(step).items() for step in total[::17])
        assert run.series("h")[0].tolist() == [step for step in total if step % 7 == 0]
        assert sorted(event.step for event in run.events) == list(total[::10])
    assert len(list(Path(tmp_path).glob("metrics-*.h5"))) == processes


def test_arguments_of_another_type_are_named(tmp_path):
    write(tmp_path / "r", [record(0, {"loss": 1.0})])
    with pytest.raises(TypeError, match=r"path=None is not the path"):
        open_run(None)
    with open_run(tmp_path / "r") as run:
        for ask, message in (
            (lambda: run.series(None), "key=None is not text"),
            (lambda: run.series(["loss"]), r"table\(keys\) reads many"),
            (lambda: run.table("loss"), r"give a list of keys: \['loss'\]"),
            (lambda: run.keys(["loss"]), "pattern=.* is not text"),
            (lambda: run.plot(["loss"]), "pattern=.* is not text"),
            (lambda: run.at("0"), "step='0' is not a number"),
            (lambda: run.samples("0"), "step='0' is not a number"),
        ):
            with pytest.raises(TypeError, match=message):
                ask()
