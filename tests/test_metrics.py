"""Rows merge into the row of the joined data, and metrics of a row are those of the data."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmm.core.merging import merge
from tmm.core.metrics import (
    COLUMN_SEPARATOR,
    HISTOGRAM_EDGES,
    METRIC_NAMES,
    METRICS,
    Reduction,
    builtin_reductions,
    finalize,
    function_reduction,
)
from tmm.kernels.ops import histogram, summarize

(EVERYTHING, BINS) = builtin_reductions(METRIC_NAMES, is_complex=False)


def row(values: np.ndarray, reduction: Reduction = EVERYTHING) -> np.ndarray:
    tensor = torch.from_numpy(values)
    if reduction.is_histogram:
        return histogram(tensor).numpy()[None]
    return summarize(tensor, COLUMN_SEPARATOR.join(reduction.columns)).numpy()[None]


def metrics(values: np.ndarray) -> dict[str, float]:
    return dict(zip(EVERYTHING.metrics, finalize(EVERYTHING, row(values))[0], strict=True))


numbers = arrays.arrays(
    np.float64,
    st.integers(0, 30),
    elements=st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3)),
)


@given(st.lists(numbers, min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_merged_rows_are_those_of_the_joined_data(parts: list[np.ndarray]) -> None:
    joined = np.concatenate(parts)
    merged = row(parts[0])
    for part in parts[1:]:
        merged = merge(EVERYTHING, [merged, row(part)])
    expected = row(joined)
    for index, name in enumerate(EVERYTHING.columns):
        scale = {"moment2": 2, "moment3": 3, "moment4": 4}.get(name, 1)
        magnitude = max(1.0, float(np.abs(joined).max(initial=0.0))) ** scale * len(joined)
        got, want = merged[0, index], expected[0, index]
        assert got == pytest.approx(want, rel=1e-9, abs=1e-11 * magnitude), name


@given(numbers, numbers)
@settings(max_examples=50, deadline=None)
def test_merged_histograms_are_those_of_the_joined_data(a: np.ndarray, b: np.ndarray) -> None:
    merged = merge(BINS, [row(a, BINS), row(b, BINS)])
    assert np.array_equal(merged, row(np.concatenate([a, b]), BINS))


def test_values_against_torch() -> None:
    x = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    x[:100] = 0
    centred = x - x.mean()
    expected = {
        "mean": x.mean(),
        "std": x.std(),
        "rms": x.square().mean().sqrt(),
        "norm": x.norm(),
        "mean_abs": x.abs().mean(),
        "absmax": x.abs().max(),
        "min": x.min(),
        "max": x.max(),
        "zero_fraction": torch.tensor(0.1),
        "nan_count": torch.tensor(0.0),
        "inf_count": torch.tensor(0.0),
        "kurtosis": centred.pow(4).mean() / centred.square().mean().square(),
    }
    got = metrics(x.numpy())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(
            float(value), rel=1e-6 if name == "zero_fraction" else 1e-13
        )


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_nan_makes_all_but_the_counts_nan(position: int) -> None:
    x = np.array([1.0, -2.0, np.inf])
    x[position] = np.nan
    got = metrics(x)
    counted = {"nan_count", "inf_count"}
    assert got["nan_count"] == 1
    assert got["inf_count"] == np.isinf(x).sum()
    assert {name for name, value in got.items() if math.isnan(value)} == set(got) - counted


@pytest.mark.parametrize("name", [n for n in METRICS if n not in ("nan_count", "inf_count")])
def test_a_nan_makes_each_metric_nan_by_itself(name: str) -> None:
    (alone,) = builtin_reductions((name,), is_complex=False)
    merged = merge(alone, [row(np.array([1.0, np.nan]), alone), row(np.array([3.0, 4.0]), alone)])
    assert np.isnan(finalize(alone, merged)).all()


def test_an_infinity_is_not_a_nan() -> None:
    got = metrics(np.array([1.0, np.inf, -np.inf]))
    assert (got["absmax"], got["min"], got["max"]) == (np.inf, -np.inf, np.inf)
    assert (got["rms"], got["norm"], got["mean_abs"]) == (np.inf, np.inf, np.inf)
    assert (got["zero_fraction"], got["nan_count"], got["inf_count"]) == (0, 0, 2)
    assert np.isnan([got["mean"], got["std"], got["kurtosis"]]).all()


def test_one_element_and_constants() -> None:
    one = metrics(np.array([3.0]))
    assert np.isnan([one["std"], one["kurtosis"]]).all()  # as torch.std
    assert (one["mean"], one["rms"]) == (3, 3)
    constant = metrics(np.full(1000, 0.1, dtype=np.float32))
    assert np.isnan(constant["kurtosis"])
    assert constant["std"] == pytest.approx(0, abs=1e-9)


def test_histogram_bins() -> None:
    values = np.array([0.0, 1.0, 1.5, 2.0, -1.0, np.inf, -np.inf, np.nan, 1e-30, -1e9])
    counted = finalize(BINS, row(values, BINS))[0]
    finite = HISTOGRAM_EDGES.copy()
    finite[0], finite[-1] = -1e300, 1e300
    expected = np.histogram(np.array([0, 1, 1.5, 2, -1, 1e-30, -1e9]), bins=finite)[0]
    expected[-1] += 1  # +inf
    expected[0] += 1  # -inf
    assert np.array_equal(counted, expected)
    assert row(values, BINS)[0, 0] == len(values)


def test_complex_tensors_have_no_order() -> None:
    scalars, _ = builtin_reductions(METRIC_NAMES, is_complex=True)
    assert set(METRICS) - set(scalars.metrics) == {"mean", "min", "max"}
    tensor = torch.tensor([3 + 4j, 0, 1j])
    values = summarize(tensor, COLUMN_SEPARATOR.join(scalars.columns)).numpy()[None]
    got = dict(zip(scalars.metrics, finalize(scalars, values)[0], strict=True))
    assert got["absmax"] == 5
    assert got["norm"] == pytest.approx(math.sqrt(26))
    assert builtin_reductions(("mean", "min"), is_complex=True) == ()


@pytest.mark.parametrize(
    ("aggregate", "expected"), [("mean", 2.5), ("sum", 10.0), ("min", -1.0), ("max", 6.0)]
)
def test_aggregates_of_user_functions(aggregate: str, expected: float) -> None:
    reduction = function_reduction("mine", abs, aggregate)
    parts = [np.array([-1.0, 2.0]), np.array([3.0]), np.array([6.0]), np.array([])]
    rows = [row(part, reduction) for part in parts]
    merged = rows[0]
    for other in rows[1:]:
        merged = merge(reduction, [merged, other])
    assert finalize(reduction, merged)[0, 0] == expected
