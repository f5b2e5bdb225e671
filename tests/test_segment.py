import errno
import json
import os
import tempfile
import time
from itertools import count
from pathlib import Path
from unittest import mock

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tmm.core.records import Event, KeyInfo, StepRecord, Table
from tmm.runtime.store import segment_writer as segment
from tmm.runtime.store.segment_layout import ABSENT, ABSENT_BITS, is_measured, segment_paths
from tmm.runtime.store.segment_reader import SegmentReader
from tmm.runtime.store.segment_writer import SegmentWriter

BINS = 3
NAN = np.float64(np.nan)


def info(key, position=0):
    return KeyInfo(key, key.partition("/")[0], key.partition("/")[2], position, "mean", "noted")


def table(values):
    """A table of ``{key: number or list of numbers}``."""
    return Table(tuple(map(info, values)), np.array(list(values.values()), dtype=np.float64))


def record(step, scalars=None, histograms=None, events=()):
    tables = [() if values is None else (table(values),) for values in (scalars, histograms)]
    return StepRecord(step, *tables, tuple(events))


def bits(value):
    """The bit patterns of a number or an array, with those of NaN made one."""
    array = np.array(value, dtype=np.float64)
    array[np.isnan(array)] = NAN
    return array.view(np.uint64).tolist()


def rows_of(reader):
    rows = [reader.row(i) for i in range(len(reader.steps))]
    return [{key: bits(value) for key, value in row.items()} for row in rows]


def dense(reader, key):
    """The values of a key in all rows, with `ABSENT` where it was not measured."""
    rows, values = reader.series(key)
    result = np.full((len(reader.steps), *values.shape[1:]), ABSENT)
    result[rows] = values
    return result


any_text = st.text(st.characters(), max_size=20)  # with lone surrogates
any_key = st.one_of(
    any_text,
    st.sampled_from(["", "a/b c/d\ne\r\u2028", "\ud800\udc00", "\U00010000", '"\\', "ä/" * 5000]),
)
any_step = st.one_of(st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1))
any_number = st.one_of(st.floats(), st.sampled_from([ABSENT, -0.0, 5e-324, -np.inf]))
any_event = st.builds(Event, step=st.integers(), kind=any_text, text=any_text)


@st.composite
def any_records(draw):
    keys = draw(st.lists(any_key, unique=True, min_size=2, max_size=8))
    split = draw(st.integers(1, len(keys) - 1))
    numbers = st.dictionaries(st.sampled_from(keys[:split]), any_number)
    bins = st.lists(any_number, min_size=BINS, max_size=BINS)
    histograms = st.dictionaries(st.sampled_from(keys[split:]), bins, min_size=1)
    return draw(
        st.lists(
            st.builds(
                record,
                any_step,
                st.none() | numbers,
                st.none() | histograms,
                st.lists(any_event, max_size=2),
            ),
            max_size=40,
        )
    )


@settings(deadline=None)
@given(any_records(), st.sampled_from([0, 2, 16]))
def test_what_is_written_is_read_exactly(records, few):
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(segment, "_FEW", few):
        writer = SegmentWriter(Path(folder), keys=1, bins=2)
        live = SegmentReader(writer.path)
        for one in records:
            writer.write(one)
            assert live.refresh()
        writer.close()
        closed = SegmentReader(writer.path)
        expected = [
            {
                one_info.key: bits(value)
                for tables in (one.scalars, one.histograms)
                for part in tables
                for one_info, value in zip(part.infos, part.values, strict=True)
            }
            for one in records
        ]
        for reader in (live, closed):
            assert reader.steps.tolist() == [one.step for one in records]
            assert reader.measured.tolist() == [
                bool(one.scalars or one.histograms) for one in records
            ]
            assert reader.events == [event for one in records for event in one.events]
            assert rows_of(reader) == expected
            for key, known in (reader.infos | reader.histogram_infos).items():
                assert known == info(key)
                series = dense(reader, key)
                there = is_measured(series)
                assert [bits(value) for value in series[there]] == [
                    row[key] for row in expected if key in row
                ]
                assert there.tolist() == [key in row for row in expected]
            keys = ["none", *reversed(reader.infos)]
            table_of_keys = reader.table(keys)
            assert (table_of_keys[0].view(np.uint64) == ABSENT_BITS).all()
            for key, series in zip(keys[1:], table_of_keys[1:], strict=True):
                assert (
                    series.view(np.uint64).tolist() == dense(reader, key).view(np.uint64).tolist()
                )
            reader.close()


def test_the_pattern_for_absent_is_a_nan_that_users_cannot_write(tmp_path):
    assert np.isnan(ABSENT)
    writer = SegmentWriter(tmp_path, keys=2)
    writer.write(record(0, {"a": ABSENT, "b": 1.0}))
    writer.write(record(1, {"b": 2.0}))
    writer.close()
    reader = SegmentReader(writer.path)
    assert is_measured(dense(reader, "a")).tolist() == [True, False]
    assert dense(reader, "a").view(np.uint64).tolist() == [NAN.view(np.uint64), ABSENT_BITS]
    reader.close()


@pytest.mark.parametrize("steps", [31, 32, 33, 700])
@pytest.mark.parametrize("keys", [1, 63, 65, 257, 600])
def test_every_chunk_boundary_holds(tmp_path, steps, keys):
    """Also the one of ``steps`` (512 rows) and those of the text (8 KiB)."""
    writer = SegmentWriter(tmp_path, keys=keys // 2)
    first, second = (
        tuple(info(f"{name}/{i}", i) for i in range(keys // 2 + 1)) for name in ("a", "b")
    )
    values = np.random.default_rng(keys).standard_normal((steps, 2, keys // 2 + 1))
    for step in range(steps):
        parts = (Table(first, values[step, 0]), Table(second, values[step, 1]))
        writer.write(StepRecord(step, parts[: 1 + (step >= steps // 2)]))
    writer.close()
    reader = SegmentReader(writer.path)
    for column in (0, keys // 4, keys // 2):
        assert np.array_equal(dense(reader, f"a/{column}"), values[:, 0, column])
        late = dense(reader, f"b/{column}")
        assert np.array_equal(late[steps // 2 :], values[steps // 2 :, 1, column])
        assert not is_measured(late[: steps // 2]).any()
    assert len(reader.row(0)) == keys // 2 + 1
    assert len(reader.row(steps - 1)) == 2 * (keys // 2 + 1)
    reader.close()


def test_more_layouts_than_are_remembered(tmp_path):
    writer = SegmentWriter(tmp_path, keys=4)
    for step in range(200):
        writer.write(record(step, {f"k{step % 7}": step, f"n{step}": -step}))
    writer.close()
    reader = SegmentReader(writer.path)
    assert [reader.row(i) for i in range(200)] == [
        {f"k{i % 7}": i, f"n{i}": -i} for i in range(200)
    ]
    reader.close()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (StepRecord(5, (table({"a": 1.0}), table({"a": 2.0}))), "'a' twice"),
        (record(5, {"h": 1.0}), "histogram"),
        (record(5, None, {"a": [1.0, 2.0, 3.0]}), "histogram"),
        (record(5, {"x": 1.0}, {"x": [1.0, 2.0, 3.0]}), "'x' twice"),
        (record(5, None, {"h": [1.0, 2.0]}), "2 bins in a segment of 3"),
        (record(5, None, {"h": []}), "without bins"),
        (record(5, {"a": [1.0, 2.0]}), "shape"),
        (StepRecord(5, (Table((info("a"),), np.zeros(2)),)), "shape"),
        (record(2**63, {"a": 1.0}), "64 bits"),
    ],
)
def test_a_record_that_makes_no_sense_is_refused_and_leaves_nothing(tmp_path, wrong, message):
    writer = SegmentWriter(tmp_path, keys=2)
    writer.write(record(1, {"a": 1.0}, {"h": [1.0, 2.0, 3.0]}))
    with pytest.raises(ValueError, match=message):
        writer.write(wrong)
    writer.write(record(2, {"b": 2.0}))
    writer.close()
    reader = SegmentReader(writer.path)
    assert reader.steps.tolist() == [1, 2]
    assert list(reader.infos) == ["a", "b"]
    assert reader.row(1) == {"b": 2.0}
    reader.close()


def test_histogram_edges_are_kept_with_infinities(tmp_path):
    edges = np.array([-np.inf, -1.0, 0.0, np.inf])
    writer = SegmentWriter(tmp_path, keys=1, bins=3, histogram_edges=edges)
    writer.close()
    reader = SegmentReader(writer.path)
    assert reader.histogram_edges is not None
    assert reader.histogram_edges.tolist() == edges.tolist()
    reader.close()


def test_segments_are_numbered_and_sorted_and_unfinished_ones_ignored(tmp_path):
    (tmp_path / ".metrics-002.h5.partial").touch()  # a process died while it created this
    (tmp_path / "metrics-1000.h5").touch()
    (tmp_path / "metrics-01.h5").touch()
    (tmp_path / "metrics-001.h5").touch()
    assert [path.name for path in segment_paths(tmp_path)] == ["metrics-001.h5", "metrics-1000.h5"]
    (tmp_path / "metrics-1000.h5").unlink()
    writer = SegmentWriter(tmp_path, keys=1)
    assert writer.path.name == "metrics-003.h5"
    writer.close()
    assert not (tmp_path / ".metrics-003.h5.partial").exists()


def test_a_file_is_published_only_when_readers_can_open_it(tmp_path, monkeypatch):
    seen = []

    def rename(self, target):
        assert not target.exists()
        os.rename(self, target)
        reader = SegmentReader(target)
        seen.append(reader.steps.tolist())
        reader.close()

    monkeypatch.setattr(Path, "rename", rename)
    SegmentWriter(tmp_path, keys=1).close()
    assert seen == [[]]


def test_a_number_that_was_taken_in_the_meantime_is_left(tmp_path, monkeypatch):
    SegmentWriter(tmp_path, keys=1).close()
    first = (tmp_path / "metrics-001.h5").read_bytes()
    monkeypatch.setattr(
        "tmm.runtime.store.segment_writer.segment_paths", lambda _: []
    )  # as seen before
    writer = SegmentWriter(tmp_path, keys=1)
    writer.close()
    assert writer.path.name == "metrics-002.h5"
    assert (tmp_path / "metrics-001.h5").read_bytes() == first
    assert len(list(tmp_path.iterdir())) == 2


def test_what_came_within_the_resolution_of_the_clock_is_seen(tmp_path):
    writer = SegmentWriter(tmp_path, keys=1)
    writer.write(record(0, {"a": 1.0}))
    now = time.time_ns()
    os.utime(writer.path, ns=(now, now))
    reader = SegmentReader(writer.path)
    writer.write(record(1, {"a": 2.0}))
    os.utime(writer.path, ns=(now, now))
    assert reader.refresh()
    assert dense(reader, "a").tolist() == [1.0, 2.0]
    writer.close()
    reader.close()


def test_a_folder_that_is_gone_raises_and_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        SegmentWriter(tmp_path / "missing", keys=1)


def test_creation_that_fails_leaves_no_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "no")

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match=r"cannot create .*metrics-001\.h5"):
        SegmentWriter(tmp_path, keys=1)
    assert list(tmp_path.iterdir()) == []


def written(folder, steps=100, keys=300):
    writer = SegmentWriter(folder, keys=keys)
    infos = tuple(info(f"k/{i}", i) for i in range(keys))
    for step in range(steps):
        writer.write(StepRecord(step, (Table(infos, np.full(keys, step + 0.5)),)))
    writer.close()
    return writer.path


def leave(path, content):
    """A file that is as old as one that nobody writes to."""
    path.write_bytes(content)
    os.utime(path, (0, 0))


@pytest.mark.parametrize("content", [b"", b"\0" * 10_000, b"no HDF5 at all", b"\x89HDF\r\n\x1a\n"])
def test_garbage_is_named(tmp_path, content):
    path = tmp_path / "metrics-001.h5"
    leave(path, content)
    with pytest.raises(ValueError, match=r"metrics-001\.h5 is not a readable segment"):
        SegmentReader(path)


def test_a_file_of_another_make_is_named(tmp_path):
    path = tmp_path / "metrics-001.h5"
    with h5py.File(path, "w", libver="latest") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match=r"metrics-001\.h5"):
        SegmentReader(path)
    with h5py.File(path, "a", libver="latest") as file:
        file.attrs["format"] = 99
    with pytest.raises(ValueError, match="format is 99"):
        SegmentReader(path)


def test_a_truncated_file_is_named_wherever_it_was_cut(tmp_path):
    path = written(tmp_path)
    whole = path.read_bytes()
    for fraction in np.linspace(0.02, 0.98, 13):
        leave(path, whole[: int(len(whole) * fraction)])
        with pytest.raises(ValueError, match=r"metrics-001\.h5"):
            SegmentReader(path)


def test_overwritten_metadata_is_an_error_or_harmless(tmp_path):
    path = written(tmp_path, steps=40, keys=5)
    outcomes, refused = set(), 0
    whole = bytearray(path.read_bytes())
    for start in range(0, 1000, 100):  # where HDF5 keeps the superblock and the root group
        damaged = whole.copy()
        damaged[start : start + 16] = b"sixteen letters!"
        leave(path, damaged)
        try:
            reader = SegmentReader(path)
            outcomes.add(dense(reader, "k/0").tolist() == [step + 0.5 for step in range(40)])
            reader.close()
        except ValueError as error:
            outcomes.add(str(path) in str(error))
            refused += 1
    assert outcomes == {True}
    assert refused > 1


def test_a_missing_file_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        SegmentReader(tmp_path / "metrics-001.h5")


def test_a_reader_in_the_same_process_survives_close_and_abandon(tmp_path):
    for leave in (SegmentWriter.close, SegmentWriter.abandon):
        writer = SegmentWriter(tmp_path, keys=3)
        for step in range(50):
            writer.write(record(step, {"a": step + 0.5}))
        reader = SegmentReader(writer.path)
        leave(writer)
        with pytest.raises(OSError, match=r"step 7: .*closed"):
            writer.write(record(7, {"a": 1.0}))
        reader.refresh()
        assert dense(reader, "a").tolist() == [step + 0.5 for step in range(50)]
        leave(writer)  # once more does nothing
        reader.close()
        again = SegmentReader(writer.path)
        assert again.steps.tolist() == list(range(50))
        again.close()


def test_closing_a_reader_leaves_a_writer_in_the_same_process_alone(tmp_path):
    writer = SegmentWriter(tmp_path, keys=3)
    for step in range(100):
        writer.write(record(step, {"a": step + 0.5, f"b{step}": 1.0}))
        reader = SegmentReader(writer.path)
        assert reader.row(step) == {"a": step + 0.5, f"b{step}": 1.0}
        reader.close()
    writer.close()


def test_the_file_can_be_read_without_this_library(tmp_path):
    for keys, few in ((2, "few_"), (20, "")):
        with h5py.File(written(tmp_path, steps=3, keys=keys), "r") as file:
            assert file["steps"][:].tolist() == [0, 1, 2]
            lines = file[f"{few}keys"][:].tobytes().decode().splitlines()
            assert [json.loads(line)["key"] for line in lines] == [f"k/{i}" for i in range(keys)]
            assert file[f"{few}values"][:].tolist() == [[0.5] * keys, [1.5] * keys, [2.5] * keys]


def test_few_values_in_each_step_take_little_beside_many_in_some(tmp_path):
    writer = SegmentWriter(tmp_path, keys=1000)
    logged, measured = (info("loss"), info("rate")), tuple(info(f"k/{i}") for i in range(1000))
    steps = 2000
    for step in range(steps):
        tables = [Table(logged, np.array([step, 0.5]))]
        if step % 100 == 0:
            tables.append(Table(measured, np.full(1000, float(step))))
        elif step % 100 == 1:
            tables.append(Table(measured[:3], np.full(3, float(step))))  # keys keep their places
        writer.write(StepRecord(step, tuple(tables)))
    writer.close()
    reader = SegmentReader(writer.path)
    assert dense(reader, "loss").tolist() == list(range(steps))
    assert reader.row(200) == {"loss": 200, "rate": 0.5} | {f"k/{i}": 200 for i in range(1000)}
    assert reader.row(201) == {"loss": 201, "rate": 0.5, "k/0": 201, "k/1": 201, "k/2": 201}
    assert reader.row(203) == {"loss": 203, "rate": 0.5}
    reader.close()
    with h5py.File(writer.path, "r") as file:
        assert file["few_values"].shape == (steps, 2)
        assert file["values"].shape == (2 * steps // 100, 1000)
        assert sum(file[name].id.get_storage_size() for name in ("few_values", "commits")) < (
            160 * steps
        )
        assert file["values"].id.get_storage_size() < 600_000  # two rows of chunks


FORKS = """
import os, sys
from pathlib import Path
import numpy as np
from tmm.core.records import KeyInfo, StepRecord, Table
from tmm.runtime.store.segment_writer import SegmentWriter

class ForkWhileWriting(tuple):
    def __iter__(self):
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)  # until the parent has gone on for long
            sys.exit(0)  # runs what HDF5 does at exit
        return super().__iter__()

read, write = os.pipe()
infos = tuple(KeyInfo(f"k/{i}", "k", str(i), i, "mean") for i in range(300))
writer = SegmentWriter(Path(sys.argv[1]), keys=300)
for step in range(300):
    events = ForkWhileWriting() if step == 50 else ()
    writer.write(StepRecord(step, (Table(infos, np.full(300, step + 0.5)),), events=events))
if os.fork() == 0:
    try:
        writer.write(StepRecord(-1, (Table(infos, np.zeros(300)),)))
    except OSError:
        sys.exit(0)
    os._exit(1)
os.close(write)
for _ in range(2):
    assert os.wait()[1] == 0
writer.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_cannot_touch_the_file(tmp_path, interpreters):
    done = interpreters.run(FORKS, tmp_path, warns=False)
    assert (done.returncode, done.stderr) == (0, "")
    reader = SegmentReader(tmp_path / "metrics-001.h5")
    assert reader.steps.tolist() == list(range(300))
    for key in ("k/0", "k/150", "k/299"):
        assert dense(reader, key).tolist() == [step + 0.5 for step in range(300)]
    reader.close()


def test_concurrent_claims_get_numbers_of_their_own(tmp_path):
    writers = [SegmentWriter(tmp_path, keys=1) for _ in range(5)]
    numbers = count(1)
    for writer in writers:
        assert writer.path.name == f"metrics-{next(numbers):03d}.h5"
        writer.write(record(0, {writer.path.name: 1.0}))
    for writer in writers:
        writer.close()
    for path in segment_paths(tmp_path):
        reader = SegmentReader(path)
        assert list(reader.infos) == [path.name]
        reader.close()
