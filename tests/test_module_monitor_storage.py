"""The storage of ``tmm.module_monitor``, beside that of torch-module-monitor."""

import logging
import math
import os
from decimal import Decimal
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch_module_monitor.storage import StorageManager as Original

from tmm.module_monitor.storage import StorageManager

TYPICAL = ("loss", "activation/fc1/mean", "RCC (W_t-W_0)x_t/fc.weight/W_t x_t/l2norm")
HARD = (
    *("", ".", "..", "/", "//", "a/", "/a", "a//b", "a/./b", "a/../b"),
    *("keys", "values", "a", "a/b", "a/keys", "a/values", "a/keys/values", "position"),
    *("%", "%25", "%6b657973", "a/%", "50%", "%6", "%zz", "ä/π", "😀", " a ", "a\\b"),
    *("a\0b", "a", "\0", "\ud800", "a/\udc80/\ud83d\ude00", "long" * 20_000, "a/" * 300),
)
KEYS = st.one_of(
    st.sampled_from(HARD),
    st.text(st.characters(exclude_categories=())),
    st.lists(st.sampled_from(["a", "", ".", "keys", "values", "%"]), min_size=1).map("/".join),
)
STEPS = st.one_of(st.integers(0, 2**53), st.sampled_from([-1, 0.5, 1e-300]))
LOGS = st.dictionaries(STEPS, st.dictionaries(KEYS, st.floats(), max_size=6), max_size=4)
ALL_HARD = {0: {key: float(i) for i, key in enumerate(HARD)}}
both = pytest.mark.parametrize("manager", [StorageManager, Original])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("storage") / "log.h5"


def loaded_with(log_dict, manager=StorageManager):
    storage = manager()
    storage.load_metrics(log_dict)
    return storage


def is_mean_and_range(values):
    return {"": values.mean(), "[min]": values.min(), "[max]": values.max()}


# Logging


@both
def test_a_value_stays_itself_and_several_make_a_list(manager):
    storage = manager()
    storage.log_scalar(3, "a", 2)
    storage.log_scalar(3, "b", True)
    storage.log_scalar(3, "c", torch.tensor([[1.5]], requires_grad=True))
    storage.log_scalar(3, "d", np.float32(0.5))
    for value in (1, 2.0, np.int64(6)):
        storage.log_scalar(3, "e", value)
    assert storage.has_step(3)
    assert not storage.has_step(2)
    assert storage.get_step_metrics(2) == {}
    assert storage.get_step_metrics(3) == {"a": 2, "b": True, "c": 1.5, "d": 0.5, "e": [1, 2.0, 6]}
    assert storage.get_all_metrics() is storage.log_dict
    storage.aggregate_step(3)
    assert storage.log_dict == {3: {"a": 2, "b": True, "c": 1.5, "d": 0.5, "e": 3.0}}


@pytest.mark.parametrize(
    "value",
    [None, "1", 1j, np.zeros(1), [1.0], torch.ones(2), torch.ones(0), torch.tensor(1j), 10**400],
)
def test_what_is_not_one_number_is_refused_by_key_and_value(value):
    storage = StorageManager()
    with pytest.raises(ValueError, match="fc1/mean") as error:
        storage.log_scalar(0, "fc1/mean", value, aggregation_fn=max)
    assert repr(value) in str(error.value)
    assert storage.log_dict == {}
    assert storage.aggregation_fns == {}


def test_other_kinds_of_numbers_are_numbers():
    storage = StorageManager()
    values = {"a": np.bool_(True), "b": Decimal("0.5"), "c": torch.tensor(True), "d": np.float16(2)}
    storage.log_scalars(0, values)
    storage.log_scalars(0, values, aggregation_fn=max)
    storage.aggregate_step(0)
    assert repr(storage.log_dict) == repr({0: {"a": 1.0, "b": 0.5, "c": 1.0, "d": 2.0}})


@both
def test_all_elements_of_all_tensors_are_joined(manager):
    storage = manager()
    storage.log_tensor(0, "a", torch.tensor([[1.0, 2.0], [3.0, 6.0]], requires_grad=True).T)
    storage.log_tensor(0, "a", torch.tensor(8.0))
    held = storage.log_dict[0]["a"]
    assert [part.tolist() for part in held] == [[1.0, 3.0, 2.0, 6.0], [8.0]]
    assert not any(part.requires_grad for part in held)
    storage.aggregate_step(0)
    assert storage.log_dict == {0: {"a": 4.0}}


def test_a_tensor_counts_as_it_was_when_logged():
    storage = StorageManager()
    tensors = [torch.ones(4), torch.ones(2, 3), torch.ones(3, 2).T, torch.ones(1).expand(5)]
    for tensor in tensors:
        storage.log_tensor(0, "a", tensor)
    for tensor in tensors[:3]:
        tensor.fill_(7)
    tensors[3][:1] = 7
    storage.aggregate_step(0)
    assert storage.log_dict[0]["a"] == 1.0


def test_numbers_and_tensors_do_not_mix_under_a_key():
    storage = StorageManager()
    storage.log_scalar(0, "number", 1)
    storage.log_scalar(0, "numbers", 1)
    storage.log_scalar(0, "numbers", 2)
    storage.log_tensor(0, "tensor", torch.ones(1))
    for key in ("number", "numbers"):
        with pytest.raises(ValueError, match=f"'{key}'.*holds numbers.*step 0"):
            storage.log_tensor(0, key, torch.ones(1))
    with pytest.raises(ValueError, match="'tensor'.*holds tensors.*step 0"):
        storage.log_scalar(0, "tensor", 1)
    storage.log_scalar(1, "tensor", 1)
    with pytest.raises(TypeError, match="'number'.*not a tensor"):
        storage.log_tensor(0, "number", 1.0)
    assert storage.log_dict[0] == {"number": 1, "numbers": [1, 2], "tensor": [torch.ones(1)]}


@both
def test_entries_are_created_cleared_and_loaded(manager):
    storage = manager()
    storage.log_tensor(0, "a", torch.ones(1), aggregation_fn=torch.sum)
    storage.create_step_entry(0)
    assert storage.log_dict == {0: {}}
    with pytest.raises(ValueError, match="not empty"):
        storage.load_metrics({1: {"a": 1.0}})
    storage.clear()
    storage.load_metrics({1: {"a": 1.0}, 2: {"b": 3.0, "a": 2.0}})
    assert storage.log_dict == {1: {"a": 1.0}, 2: {"b": 3.0, "a": 2.0}}
    assert storage.condensed_log_dict() == {"a": {1: 1.0, 2: 2.0}, "b": {2: 3.0}}
    assert storage.aggregation_fns == {"a": torch.sum}


# Aggregation


@both
def test_functions_are_remembered_and_may_name_several_values(manager):
    storage = manager()
    for step in (0, 1):
        functions = {"m": max, "t": is_mean_and_range, "u": lambda x: {"/sum": x.sum()}}
        given = functions if step == 0 else {}
        storage.log_scalar(step, "m", 1.0, given.get("m"))
        storage.log_scalar(step, "m", 5.0)
        storage.log_tensor(step, "t", torch.arange(3.0), given.get("t"))
        storage.log_tensor(step, "u", torch.ones(step + 1), given.get("u"))
        storage.aggregate_step(step)
        storage.aggregate_step(step)
    every = {"m": 5.0, "t": 1.0, "t[min]": 0.0, "t[max]": 2.0}
    assert storage.log_dict == {0: every | {"u/sum": 1.0}, 1: every | {"u/sum": 2.0}}


def test_every_result_is_a_float():
    storage = StorageManager()
    storage.log_scalar(0, "once", 3)
    for value in (1, 2):
        storage.log_scalar(0, "mean", value)
        storage.log_scalar(0, "numbers", value, lambda values: {"": np.max(values)})
    storage.log_tensor(0, "tensors", torch.ones(2), is_mean_and_range)
    storage.log_tensor(0, "numpy", torch.ones(2), lambda x: np.float32(x.numel()))
    storage.log_tensor(0, "int", torch.arange(4))  # torch has no mean of integers
    storage.aggregate_step(0)
    assert {type(value) for value in storage.log_dict[0].values()} == {float}
    assert storage.log_dict[0]["int"] == 1.5


@both
def test_a_function_of_numbers_gets_the_list_of_them(manager):
    storage = manager()
    seen = []
    for value in (1, True, 2.5):
        storage.log_scalar(0, "a", value, lambda values: seen.append(values) or len(values))
    storage.aggregate_step(0)
    assert seen == [[1, True, 2.5]]
    assert storage.log_dict[0]["a"] == 3


def test_means_are_in_float64():
    storage = StorageManager()
    big = torch.full((3,), 60_000.0, dtype=torch.float16)
    storage.log_tensor(0, "half", big)
    storage.log_tensor(0, "half", big)
    for value in (np.float16(60_000), np.float16(60_000), np.float16(60_000)):
        storage.log_scalar(0, "halves", value)
    for part in (torch.tensor([1], dtype=torch.int64), torch.tensor([2.0]), torch.tensor(True)):
        storage.log_tensor(0, "mixed", part)
    storage.aggregate_step(0)
    assert storage.log_dict[0] == {
        "half": 60_000.0,
        "halves": 60_000.0,
        "mixed": pytest.approx(4 / 3),
    }


def test_keys_without_elements_go():
    storage = StorageManager()
    storage.log_tensor(0, "empty", torch.ones(0, 3))
    storage.log_tensor(0, "empty", torch.ones(0), is_mean_and_range)
    storage.log_tensor(0, "partly", torch.ones(0))
    storage.log_tensor(0, "partly", torch.ones(1))
    storage.aggregate_step(0)
    assert storage.log_dict == {0: {"partly": 1.0}}


@pytest.mark.parametrize("function", [lambda x: x / 0, lambda x: None, lambda x: {"": "text"}])
def test_a_function_that_fails_is_named_and_leaves_the_step(function):
    storage = StorageManager()
    for value in (1.0, 2.0):
        storage.log_scalar(0, "first", value)
        storage.log_scalar(0, "fc1/mean", value, function)
    with pytest.raises(ValueError, match="fc1/mean"):
        storage.aggregate_step(0)
    assert storage.log_dict[0] == {"first": [1.0, 2.0], "fc1/mean": [1.0, 2.0]}
    storage.aggregation_fns["fc1/mean"] = max
    storage.aggregate_step(0)
    assert storage.log_dict[0] == {"first": 1.5, "fc1/mean": 2.0}


def test_no_value_takes_the_place_of_another_key_or_of_half_of_itself():
    storage = StorageManager()
    storage.log_tensor(0, "a", torch.ones(1), lambda x: {"[max]": x.max()})
    storage.log_tensor(0, "a[max]", torch.zeros(1))
    with pytest.raises(ValueError, match=r"'a\[max\]' and 'a' both give 'a\[max\]'"):
        storage.aggregate_step(0)
    storage.log_tensor(1, "phase", torch.tensor([1j]))
    with pytest.raises(ValueError, match="'phase' is complex"):
        storage.aggregate_step(1)
    storage.log_tensor(1, "phase", torch.tensor([1j]), lambda x: x.abs().sum())
    storage.aggregate_step(1)
    assert storage.log_dict[1] == {"phase": 2.0}


@both
def test_the_logger_hears_of_each_aggregated_step(manager, caplog):
    storage = manager(logging.getLogger("storage"))
    storage.log_scalar(7, "a", 1.0)
    with caplog.at_level(logging.INFO):
        storage.aggregate_step(6)
        storage.aggregate_step(7)
    (message,) = caplog.messages
    assert message.startswith("Logged 1 keys at step 7. Total size of log data: ")
    assert message.endswith(" KB")


# Files


@settings(max_examples=50, deadline=None)
@given(LOGS)
@example(ALL_HARD)
@example({step: {"b": math.nan, "a": -math.inf, "c": -0.0} for step in (5, 3, 2**53, 0.5)})
def test_a_file_by_key_gives_everything_back(file, log_dict):
    storage = loaded_with(log_dict)
    condensed = storage.condensed_log_dict()
    storage.save_hdf5(file)
    assert repr(StorageManager.load_hdf5(file)) == repr(condensed)
    assert StorageManager.read_hdf5_entry_keys(file) == list(condensed)
    for key, series in condensed.items():
        steps, values = StorageManager.read_hdf5_entry(file, key)
        assert (steps.dtype, values.dtype) == (np.float64, np.float64)
        assert steps.tolist() == list(series)
        np.testing.assert_array_equal(values, list(series.values()))
    for key in ("", "/", "a", "a/b", "a/keys", "a\0", "%", "none"):
        assert key in condensed or StorageManager.read_hdf5_entry(file, key) is None


@settings(max_examples=50, deadline=None)
@given(LOGS)
@example(ALL_HARD)
@example({2**60 + 1: {}, 3: {"b": math.nan, "a": math.inf}, 0.5: {"a": -0.0}})
def test_a_file_by_step_gives_everything_back(file, log_dict):
    loaded_with(log_dict).save_hdf5(file, condensed=False)
    assert repr(StorageManager.load_hdf5(file)) == repr(log_dict)
    assert StorageManager.read_hdf5_entry_keys(file) == [str(step) for step in log_dict]
    for step, metrics in log_dict.items():
        for entry_key in (step, str(step)):
            keys, values = StorageManager.read_hdf5_entry(file, entry_key)
            assert list(keys) == list(metrics)
            np.testing.assert_array_equal(values, list(metrics.values()))
    for step in (-7, "", ".", "/", "a\0", "keys", "0/keys", "\ud800"):
        assert StorageManager.read_hdf5_entry(file, step) is None


def test_a_file_by_step_has_the_layout_that_was_documented(file):
    loaded_with({4: {"ä/b": 1.0}}).save_hdf5(file, condensed=False)
    with h5py.File(file) as opened:
        assert h5py.check_string_dtype(opened["4/keys"].dtype) == ("utf-8", None)
        assert opened["4/keys"].asstr()[()].tolist() == ["ä/b"]
        assert opened["4/values"].dtype == np.float64


def test_the_original_reads_keys_without_a_slash(file):
    log_dict = {step: {"loss": step / 3, "keys": math.inf, "50%": 1.0} for step in (0, 10, 20)}
    storage = loaded_with(log_dict)
    storage.save_hdf5(file)
    assert set(Original.read_hdf5_entry_keys(file)) == {"loss", "keys", "50%"}
    assert Original.load_hdf5(file) == storage.condensed_log_dict()


def test_typical_keys_are_paths(file):
    loaded_with({1: dict.fromkeys(TYPICAL, 2.0)}).save_hdf5(file)
    with h5py.File(file) as opened:
        for key in TYPICAL:
            assert opened[f"{key}/keys"][()].tolist() == [1.0]
            assert opened[f"{key}/values"][()].tolist() == [2.0]


def test_files_of_the_original_are_read(file):
    log_dict = {step: dict.fromkeys((*TYPICAL, "50%", "%25"), step + 0.5) for step in (0, 10)}
    log_dict[10] |= {"a": 1.0, "a/b": math.nan, "x/keys": 3.0}
    original = loaded_with(log_dict, Original)
    original.save_hdf5(file)
    condensed = original.condensed_log_dict()
    loaded = StorageManager.load_hdf5(file)
    assert repr(sorted(loaded.items())) == repr(sorted(condensed.items()))
    assert sorted(StorageManager.read_hdf5_entry_keys(file)) == sorted(condensed)
    steps, values = StorageManager.read_hdf5_entry(file, TYPICAL[1])
    assert (steps.tolist(), values.tolist()) == ([0.0, 10.0], [0.5, 10.5])
    for absent in ("activation", "activation/fc1", "a/keys", "/a", "a/", "none", "a\0", ""):
        assert StorageManager.read_hdf5_entry(file, absent) is None


def test_what_the_original_dropped_is_not_in_its_files(file):
    loaded_with({0: {"b": "text", "c": 1.0, "": 1.0}}, Original).save_hdf5(file)
    assert StorageManager.load_hdf5(file) == {"c": {0: 1.0}}
    loaded_with({0: {"lists": [1.0, 2.0]}}, Original).save_hdf5(file)
    assert StorageManager.load_hdf5(file) == {"lists": {0: [1.0, 2.0]}}
    loaded_with({0: {"a": 1.0}}, Original).save_hdf5(file, condensed=False)
    assert StorageManager.load_hdf5(file) == {}


@pytest.mark.parametrize("condensed", [True, False])
@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"fc/mean": [1.0, 2.0]}, r"'fc/mean' of step 7 was not aggregated.*aggregate_step\(7\)"),
        ({"fc/mean": [torch.ones(2)]}, r"'fc/mean' of step 7 was not aggregated"),
        ({"fc/mean": "text"}, r"'fc/mean' of step 7.*'text' is not one real number; replace"),
        ({"fc/mean": torch.ones(2)}, r"'fc/mean' of step 7.*not one real number"),
        ({3: 1.0}, r"3 of step 7.*not text"),
    ],
)
def test_what_cannot_be_saved_leaves_the_earlier_file(tmp_path, condensed, metrics, message):
    file = tmp_path / "log.h5"
    loaded_with({0: {"a": 1.0}}).save_hdf5(file, condensed)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=message):
        loaded_with({6: {"a": 1.0}, 7: {"a": 1.0} | metrics}).save_hdf5(file, condensed)
    assert file.read_bytes() == before
    assert os.listdir(tmp_path) == ["log.h5"]


@pytest.mark.parametrize("step", ["warmup", math.nan, None, 1j])
@pytest.mark.parametrize("condensed", [True, False])
def test_steps_are_numbers(file, step, condensed):
    with pytest.raises(ValueError, match=f"step {step!r}"):
        loaded_with({step: {"a": 1.0}}).save_hdf5(file, condensed)


@pytest.mark.parametrize("step", [2**53 + 1, np.int64(2**53 + 1), 10**400])
def test_a_step_that_float64_would_change_is_refused(file, step):
    storage = loaded_with({step: {"fc/mean": 1.0}})
    with pytest.raises(ValueError, match=r"'fc/mean' is no float64.*condensed=False"):
        storage.save_hdf5(file)
    storage.save_hdf5(file, condensed=False)
    assert StorageManager.load_hdf5(file) == {int(step): {"fc/mean": 1.0}}


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    file = tmp_path / "log.h5"
    loaded_with({0: {"a": 1.0}}).save_hdf5(file)
    before = file.read_bytes()

    def fail(*arguments, **options):
        raise OSError("disk full")

    for owner, name in ((h5py.Group, "create_dataset"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(OSError, match="disk full"):
                loaded_with({0: {"a": 2.0}}).save_hdf5(file)
        assert file.read_bytes() == before
        assert os.listdir(tmp_path) == ["log.h5"]


def test_paths_may_be_text_relative_or_links(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.symlink("real.h5", "link.h5")
    for name in ("plain.h5", "link.h5", str(tmp_path / "absolute.h5"), "n" * 250):
        loaded_with({0: {"a": np.float32(0.5), "b": torch.tensor([2.0])}}).save_hdf5(name)
        assert StorageManager.load_hdf5(name) == {"a": {0: 0.5}, "b": {0: 2.0}}
    assert Path("link.h5").is_symlink()
    assert sorted(os.listdir()) == ["absolute.h5", "link.h5", "n" * 250, "plain.h5", "real.h5"]
    with pytest.raises(FileNotFoundError):
        StorageManager().save_hdf5("missing/log.h5")
    with pytest.raises(FileNotFoundError):
        StorageManager.load_hdf5("missing.h5")


def test_a_form_of_a_later_version_is_refused(file):
    with h5py.File(file, "w") as opened:
        opened.attrs["tmm_form"] = "columns"
    for read in (StorageManager.load_hdf5, StorageManager.read_hdf5_entry_keys):
        with pytest.raises(ValueError, match="form 'columns'"):
            read(file)
