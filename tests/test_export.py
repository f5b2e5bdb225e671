"""Runs in the files of other programs."""

import csv
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_module_monitor.storage import StorageManager as Original

import tmm
from tests.test_reader import BINS, exact, record, write
from tmm.runs import export
from tmm.runs.export import export_run
from tmm.runs.recorded_run import open_run

HARD = (
    *("a,b", 'say "x"', '"', "two\nlines", "\r", "a\r\nb", "/", "a//b", "/a/", "a", "a/b"),
    *("activation/blocks.0/rms", "ä/π", "😀", "", " a ", "\t", "nan", "inf", "0", "keys", "a/keys"),
    *("%25", ".", "..", "\u2028", "\x85", "\ufeff", "a\0b", "long" * 5000, "=1+1", "'", "\\", "#"),
)
NUMBERS = (0.1, -0.0, 1e300, 5e-324, math.nan, math.inf, -math.inf, 1.0, 2**53 + 2.0, 1 / 3)
LONG_FORMS = ("csv", "parquet")
FORMATS = (*LONG_FORMS, "jsonl", "hdf5")
keys = st.sampled_from(HARD) | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
steps = st.integers(-3, 20) | st.sampled_from([2**53, -(2**53)])
logs = st.dictionaries(
    steps, st.dictionaries(keys, st.floats() | st.sampled_from(NUMBERS), min_size=1, max_size=6)
)


@pytest.fixture
def run(tmp_path):
    """Two numbers and a histogram, which not every step measured, in two segments."""
    write(
        tmp_path / "run",
        [
            record(
                0, {"loss": 2.5, "activation/a/rms": math.nan}, {"activation/a/histogram": [1] * 4}
            )
        ],
        [record(2, {"loss": math.inf}), record(5, {"activation/a/rms": -0.1, "loss": 1 / 3})],
    )
    with open_run(tmp_path / "run") as opened:
        yield opened


EXPECTED = {
    "loss": {0: 2.5, 2: math.inf, 5: 1 / 3},
    "activation/a/rms": {0: math.nan, 5: -0.1},
}


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file, strict=True)
    assert head == ["step", "key", "value"]
    return by_key((int(step), key.removeprefix("'"), float(value)) for step, key, value in rows)


def read_parquet(path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = parquet.read_table(path)
    assert [str(kind) for kind in table.schema.types] == [
        "int64",
        "dictionary<values=string, indices=int32, ordered=0>",
        "double",
    ]
    assert all(column.null_count == 0 for column in table.columns)
    return by_key(zip(*(column.to_pylist() for column in table.columns), strict=True))


def read_jsonl(path):
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    lines = path.read_bytes().decode("ascii").splitlines()
    rows = []
    for line in lines:
        values = json.loads(line, parse_constant=refuse)
        step = values.pop("step")
        assert values
        rows += [(step, key, float(value)) for key, value in values.items()]
    return by_key(rows)


def by_key(rows):
    result = {}
    for step, key, value in rows:
        assert step not in result.setdefault(key, {})
        result[key][step] = value
    return result


READERS = {
    "csv": read_csv,
    "parquet": read_parquet,
    "jsonl": read_jsonl,
    "hdf5": tmm.StorageManager.load_hdf5,
}


def exactly(values):
    return {
        key: {step: exact(value) for step, value in series.items()}
        for key, series in values.items()
    }


def without(name):
    """What ``sys.modules`` holds where a package is not installed."""
    return {name: None, **{found: None for found in sys.modules if found.startswith(f"{name}.")}}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_numbers_of_a_run(run, tmp_path, name):
    path = tmp_path / f"out.{name}"
    rows = export_run(run, path)
    assert exactly(READERS[name](path)) == exactly(EXPECTED)
    assert rows == (3 if name == "jsonl" else 5)
    assert os.listdir(tmp_path) in (["run", path.name], [path.name, "run"])


@pytest.mark.parametrize("name", FORMATS)
@settings(deadline=None, max_examples=40)
@given(log=logs)
def test_any_numbers_and_keys_read_back_exactly(name, log):
    for values in log.values() if name == "jsonl" else ():
        values.pop("step", None)
    expected = by_key((step, key, value) for step in log for key, value in log[step].items())
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "run"), [record(step, values) for step, values in log.items()])
        path = Path(folder, "out")
        with open_run(Path(folder, "run")) as run:
            export_run(run, path, name)
        assert exactly(READERS[name](path)) == exactly(expected)


@pytest.mark.parametrize("name", FORMATS)
def test_all_hard_keys_at_once(tmp_path, name):
    values = {key: NUMBERS[place % len(NUMBERS)] for place, key in enumerate(HARD)}
    write(tmp_path / "run", [record(7, values)])
    path = tmp_path / "out"
    with open_run(tmp_path / "run") as run:
        export_run(run, path, name)
    found = READERS[name](path)
    assert exactly(found) == exactly({key: {7: value} for key, value in values.items()})
    assert list(found) == list(HARD)


def test_files_look_as_documented(run, tmp_path):
    export_run(run, tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_bytes().decode() == (
        "step,key,value\n"
        "0,loss,2.5\n"
        "2,loss,inf\n"
        "5,loss,0.3333333333333333\n"
        "0,activation/a/rms,nan\n"
        "5,activation/a/rms,-0.1\n"
    )
    export_run(run, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes().decode() == (
        '{"step": 0, "loss": 2.5, "activation/a/rms": "NaN"}\n'
        '{"step": 2, "loss": "Infinity"}\n'
        '{"step": 5, "loss": 0.3333333333333333, "activation/a/rms": -0.1}\n'
    )


def test_torch_module_monitor_reads_entries_of_hdf5(run, tmp_path):
    path = tmp_path / "out.h5"
    export_run(run, path)
    entries = {key: Original.read_hdf5_entry(path, key) for key in EXPECTED}
    found = {key: dict(zip(*columns, strict=True)) for key, columns in entries.items()}
    assert exactly(found) == exactly(EXPECTED)


def test_the_format_may_be_named_whatever_the_suffix(run, tmp_path):
    assert export_run(run, str(tmp_path / "out.txt"), format="CSV") == 5
    assert read_csv(tmp_path / "out.txt").keys() == EXPECTED.keys()
    assert export_run(run, tmp_path / "out.CSV") == 5


@pytest.mark.parametrize(("path", "name"), [("a.json", None), ("a", None), ("a.csv", "xlsx")])
def test_an_unknown_format_names_the_known_ones(run, tmp_path, path, name):
    with pytest.raises(ValueError, match=r"csv.*jsonl.*parquet.*hdf5.*h5"):
        export_run(run, tmp_path / path, name)
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_pattern_selects_keys(run, tmp_path, name):
    path = tmp_path / f"out.{name}"
    assert export_run(run, path, pattern="activation/") == 2
    assert list(READERS[name](path)) == ["activation/a/rms"]


def test_a_pattern_without_a_key_names_the_nearest(run, tmp_path):
    with pytest.raises(ValueError, match=r"activation/a/rmss.*nearest: \['activation/a/rms'"):
        export_run(run, tmp_path / "out.csv", pattern="activation/a/rmss")
    with pytest.raises(ValueError, match=r"from the start of a key: '\.\*rms' does"):
        export_run(run, tmp_path / "out.csv", pattern="rms")
    with pytest.raises(ValueError, match="no regular expression"):
        export_run(run, tmp_path / "out.csv", pattern="(")


@pytest.mark.parametrize("name", FORMATS)
def test_a_pattern_of_histograms_only_is_refused(run, tmp_path, name):
    with pytest.raises(ValueError, match="histograms are left out"):
        export_run(run, tmp_path / "out", name, pattern=".*histogram")
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_without_numbers_makes_a_file_without_rows(tmp_path, name):
    write(tmp_path / "run", [])
    with open_run(tmp_path / "run") as run:
        assert export_run(run, tmp_path / "out", name) == 0
        assert READERS[name](tmp_path / "out") == {}
        with pytest.raises(ValueError, match="matches no key"):
            export_run(run, tmp_path / "out", name, pattern="loss")


@pytest.mark.parametrize("name", FORMATS)
def test_a_key_that_was_a_histogram_once_has_its_numbers(tmp_path, name):
    write(
        tmp_path / "run",
        [record(0, {"b": 0.5}, {"a": [1.0] * BINS}), record(1, {}, {"a": [1.0] * BINS})],
        [record(1, {"a": 1.5}), record(2, {"a": 2.5})],
    )
    with open_run(tmp_path / "run") as run:
        export_run(run, tmp_path / "out", name)
    assert READERS[name](tmp_path / "out") == {"a": {1: 1.5, 2: 2.5}, "b": {0: 0.5}}


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_that_grows_is_exported_up_to_the_start(tmp_path, monkeypatch, name):
    write(tmp_path / "run", [record(0, {"a": 1, "b": 2})])

    class Growing(tmm.Run):
        """Records a step whenever a series or a step is read."""

        def refresh(self):
            if growing:
                step = growing[0] = growing[0] + 1
                write(self.path, [record(step, {"a": step, "b": step, f"c{step}": step})])
            super().refresh()

    growing = []
    with Growing(tmp_path / "run") as run:
        held = run.steps
        growing.append(0)
        monkeypatch.setattr(Growing, "steps", held)
        export_run(run, tmp_path / "out", name, pattern="[ab]")
    assert READERS[name](tmp_path / "out") == {"a": {0: 1}, "b": {0: 2}}


@pytest.mark.parametrize("name", ["csv", "jsonl", "parquet"])
def test_a_key_that_is_no_text_is_named(tmp_path, name):
    write(tmp_path / "run", [record(0, {"a": 1, "\udc80": 2})])
    with open_run(tmp_path / "run") as run:
        with pytest.raises(ValueError, match=r"udc80.*hdf5.*pattern"):
            export_run(run, tmp_path / "out", name)
        assert export_run(run, tmp_path / "out", name, pattern="a") == 1
        export_run(run, tmp_path / "out.h5")
    assert READERS["hdf5"](tmp_path / "out.h5") == {"a": {0: 1}, "\udc80": {0: 2}}


def test_a_key_step_has_no_place_in_jsonl(tmp_path):
    write(tmp_path / "run", [record(0, {"step": 1, "a": 2})])
    with open_run(tmp_path / "run") as run:
        with pytest.raises(ValueError, match="'step'"):
            export_run(run, tmp_path / "out.jsonl")
        assert export_run(run, tmp_path / "out.jsonl", pattern="(?!step$)") == 1


def test_steps_that_are_no_float64_are_refused_by_hdf5_only(tmp_path):
    write(tmp_path / "run", [record(2**53 + 1, {"a": 1}), record(2**63 - 1, {"a": 2})])
    with open_run(tmp_path / "run") as run:
        with pytest.raises(ValueError, match=f"{2**53 + 1} of 'a'.*csv"):
            export_run(run, tmp_path / "out.h5")
        for name in ("csv", "jsonl", "parquet"):
            export_run(run, tmp_path / "out", name)
            assert READERS[name](tmp_path / "out") == {"a": {2**53 + 1: 1, 2**63 - 1: 2}}


def test_parquet_is_written_in_row_groups(run, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(export, "_GROUP_ROWS", 2)
    path = tmp_path / "out.parquet"
    assert export_run(run, path) == 5
    file = parquet.ParquetFile(path)
    sizes = [file.metadata.row_group(place).num_rows for place in range(file.num_row_groups)]
    assert sizes == [2, 1, 2]
    assert exactly(read_parquet(path)) == exactly(EXPECTED)


def test_without_pyarrow_parquet_says_how_to_get_it(run, tmp_path, monkeypatch):
    for name, module in without("pyarrow").items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        export_run(run, tmp_path / "out.parquet")
    assert export_run(run, tmp_path / "out.csv") == 5


# Files


@pytest.mark.parametrize("name", FORMATS)
def test_a_failure_leaves_the_old_file_as_it_was(run, tmp_path, monkeypatch, name):
    path = tmp_path / f"out.{name}"
    path.write_bytes(b"old")

    def fail(file):
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk is full"):
        export_run(run, path)
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == [path.name, "run"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_run_that_breaks_off_leaves_the_old_file_as_it_was(run, tmp_path, monkeypatch, name):
    path = tmp_path / f"out.{name}"
    path.write_bytes(b"old")
    reads = []

    def failing(read):
        def fails_later(self, place):
            reads.append(place)
            if len(reads) > 1:
                raise ValueError("the file is damaged")
            return read(self, place)

        return fails_later

    monkeypatch.setattr(tmm.Run, "series", failing(tmm.Run.series))
    monkeypatch.setattr(tmm.Run, "at", failing(tmm.Run.at))
    with pytest.raises(ValueError, match="damaged"):
        export_run(run, path)
    assert path.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == [path.name, "run"]


def test_a_link_stays_a_link_and_a_folder_must_exist(run, tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "out.csv")
    export_run(run, tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert read_csv(tmp_path / "out.csv").keys() == EXPECTED.keys()
    with pytest.raises(FileNotFoundError):
        export_run(run, tmp_path / "missing" / "out.csv")


@pytest.mark.parametrize("name", ["metrics-001.h5", "metrics-777.h5", "run.json"])
def test_files_of_the_run_itself_are_not_written_to(run, tmp_path, name):
    with pytest.raises(ValueError, match="a file of the run itself"):
        export_run(run, tmp_path / "run" / name, "hdf5")
    assert run.series("loss")[0].tolist() == [0, 2, 5]
    export_run(run, tmp_path / name, "hdf5")
    export_run(run, tmp_path / "run" / "loss.h5", pattern="loss")
    assert run.series("loss")[0].tolist() == [0, 2, 5]
