"""Rows of several ranks against the rows of all their data together."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tmm.core.merging import merge
from tmm.core.metrics import (
    METRIC_NAMES,
    FloatArray,
    Reduction,
    builtin_reductions,
    finalize,
    function_reduction,
)
from tmm.runtime.eager_functions import reduce_eagerly
from tmm.runtime.key_binding import SiteNames
from tmm.runtime.partials import Partials
from tmm.runtime.ranks.joined_rows import (
    JoinedLayout,
    joined,
    maxima,
    moments,
    on_the_wire,
    sums,
)
from tmm.runtime.ranks.protocol import Exchange
from tmm.runtime.ranks.wire import exchange_of, of_all_ranks

REDUCTIONS = (
    *builtin_reductions(METRIC_NAMES, is_complex=False),
    *builtin_reductions(("mean", "kurtosis"), is_complex=False),
    *(function_reduction(f"f_{a}", abs, a) for a in ("mean", "sum", "min", "max")),
)


def row(values: list[float], reduction: Reduction) -> FloatArray:
    tensor = torch.tensor(values, dtype=torch.float64)
    if reduction.function is not None:
        columns = {"count": tensor.numel(), "sum": tensor.sum()}
        columns |= {"minimum": tensor.min(), "maximum": tensor.max()} if values else {}
        return np.array([[float(columns.get(name, 0.0)) for name in reduction.columns]])
    return reduce_eagerly(tensor, reduction).numpy().astype(np.float64)[None]


def over_ranks(ranks: list[dict[str, list[float]]], reduction: Reduction) -> dict[str, FloatArray]:
    kind = on_the_wire(reduction)
    rows = [
        {kind: (tuple(own), np.concatenate([row(v, reduction) for v in own.values()]))}
        if own
        else {}
        for own in ranks
    ]
    layout = JoinedLayout()
    assert layout.extend([layout.missing(own) for own in rows]) is None
    owned = [layout.own(own) for own in rows]
    largest = np.max([maxima(own) for own in owned], axis=0)
    with np.errstate(invalid="ignore", over="ignore"):
        total = np.sum([sums(own, largest) for own in owned], axis=0)
        central = np.sum([moments(own, largest, total) for own in owned], axis=0)
    sites, joint = joined(layout, owned[0], largest, total, central)[kind]
    return {site: finalize(reduction, joint[[place]])[0] for place, site in enumerate(sites)}


NUMBERS = st.one_of(
    st.floats(-1e3, 1e3), st.sampled_from([0.0, 1e-30, np.inf, -np.inf, np.nan, 7.0])
)


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=lambda r: "-".join(r.metrics)[:40])
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_as_one_row_of_everything(reduction: Reduction, data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.lists(NUMBERS, min_size=1, max_size=6), min_size=1, max_size=4))
    found = over_ranks([{"a": part} for part in parts], reduction)["a"]
    expected = finalize(reduction, row([x for part in parts for x in part], reduction))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)
    merged = merge(reduction, [row(part, reduction) for part in parts])
    np.testing.assert_array_equal(finalize(reduction, merged)[0], found)


@pytest.mark.parametrize("reduction", REDUCTIONS[:3], ids=lambda r: "-".join(r.metrics)[:40])
def test_what_only_some_ranks_have(reduction: Reduction) -> None:
    found = over_ranks([{}, {"b": [1.0, 2.0]}, {"b": [5.0], "a": [-3.0, 4.0]}], reduction)
    np.testing.assert_allclose(found["b"], finalize(reduction, row([1.0, 2.0, 5.0], reduction))[0])
    np.testing.assert_allclose(found["a"], finalize(reduction, row([-3.0, 4.0], reduction))[0])


def test_large_means_do_not_cancel() -> None:
    (reduction,) = builtin_reductions(("std", "kurtosis"), is_complex=False)
    generator = np.random.default_rng(0)
    parts = [1e6 + generator.standard_normal(50) for _ in range(3)]
    found = over_ranks([{"a": list(part)} for part in parts], reduction)["a"]
    whole = np.concatenate(parts)
    deviation = whole - whole.mean()
    kurtosis = (deviation**4).mean() / (deviation**2).mean() ** 2
    np.testing.assert_allclose(found, [whole.std(ddof=1), kurtosis], rtol=1e-9)


def test_ranks_that_measure_something_else_are_named() -> None:
    rms, mean = (builtin_reductions((name,), is_complex=False)[0] for name in ("rms", "mean"))
    layout = JoinedLayout()
    asked = [
        [(on_the_wire(rms), "activation/a"), (on_the_wire(rms), "activation/b")],
        [(on_the_wire(rms), "activation/a"), (on_the_wire(mean), "activation/b")],
    ]
    difference = layout.extend(asked)
    assert difference is not None
    assert "rank 1 measures 'activation/b' as mean (joined), and other ranks as rms" in difference


def test_names_of_sites_take_no_hash_to_another_process() -> None:
    names = SiteNames(("activation/0", "activation/1"))
    assert hash(names) == hash(tuple(names)) == hash(names)
    again = pickle.loads(pickle.dumps(names))
    assert again == names
    assert not vars(again)


def test_what_one_rank_leaves_out_all_leave_out() -> None:
    """The rows of the other ranks would be those of a part of the batch."""
    reduction = Reduction(("norm",), ("count", "sum_squares"))
    rows = {reduction: [(("kept", "lost"), np.ones((2, 2)))]}
    collected = {(reduction, "lost"): []}
    own = Partials(rows, collected, left_out=frozenset({"lost"}))
    theirs = Partials(rows)
    contributions = [exchange_of(gathered).rows for gathered in (own, theirs)]
    kinds = dict.fromkeys(kind for some in contributions for kind in some)
    together = {kind: next(some[kind] for some in contributions if kind in some) for kind in kinds}
    for gathered in (own, theirs):
        joined = of_all_ranks(Exchange(together), gathered)
        assert joined.left_out == {"lost"}
        ((sites, values),) = joined.complete().rows[reduction]
        assert sites == ("kept",)
        assert values.shape == (1, 2)
    assert own.complete().values == {}
    assert theirs.complete() is theirs


@pytest.mark.parametrize("count", [2, 3, 7])
def test_parts_of_one_constant_have_no_deviation(count: int) -> None:
    """Rounding must not turn a dead activation into one that varies a little."""
    (reduction,) = builtin_reductions(("std", "kurtosis"), is_complex=False)
    parts = [[0.1] * size for size in (3, 10, 7, 1, 6, 9, 5)[:count]]
    for found in (
        over_ranks([{"a": part} for part in parts], reduction)["a"],
        finalize(reduction, merge(reduction, [row(part, reduction) for part in parts]))[0],
    ):
        assert found[0] == 0.0
        assert np.isnan(found[1])
