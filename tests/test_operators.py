"""The compiled kernel against the eager reductions, and both against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tmm.metrics import METRIC_NAMES, builtin_reductions, finalize
from tmm.operators import COLUMN_SEPARATOR, histogram, pack, summarize

SCALARS, _ = builtin_reductions(METRIC_NAMES, is_complex=False)
COLUMNS = COLUMN_SEPARATOR.join(SCALARS.columns)
SHAPES = [(4,), (8, 64, 128), (1001, 4), (3, 5, 7), (2, 3, 50257), (1, 1), ()]


def sample(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    if x.numel() > 3:
        x.view(-1)[::3] = 0
    return x.to(dtype)


def values(x: torch.Tensor, compiled: bool) -> dict[str, float]:
    row = summarize(x, COLUMNS, compiled).numpy()[None]
    return dict(zip(SCALARS.metrics, finalize(SCALARS, row)[0], strict=True))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float, compiled: bool
) -> None:
    x = sample(shape, dtype, offset)
    expected = values(x.double(), compiled=False)
    got = values(x, compiled)
    for name, want in expected.items():
        scale = expected["mean_abs"] if name == "mean" else abs(want)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert got[name] == pytest.approx(want, abs=tolerance * scale, nan_ok=True), name


def test_a_small_spread_about_a_large_mean_does_not_cancel() -> None:
    x = sample((64, 1024), torch.float64, 0.0).mul(1e-2).add(1000).float()
    for compiled in (False, True):
        assert values(x, compiled)["std"] == pytest.approx(float(x.double().std()), rel=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(bad: float, compiled: bool) -> None:
    x = sample((64, 128), torch.float32, 0.0)
    x[17, 3] = bad
    expected, got = values(x.double(), compiled=False), values(x, compiled)
    assert {n for n, v in got.items() if np.isnan(v)} == {
        n for n, v in expected.items() if np.isnan(v)
    }
    assert {n for n, v in got.items() if np.isinf(v)} == {
        n for n, v in expected.items() if np.isinf(v)
    }


@pytest.mark.parametrize("compiled", [False, True])
def test_any_layout_gives_the_same(compiled: bool) -> None:
    x = sample((4, 8, 16, 32), torch.float32, 0.5)
    layouts = {
        "permuted": x.permute(2, 0, 3, 1),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "strided": torch.stack([x, x + 1], dim=-1)[..., 0],
        "offset": torch.cat([torch.zeros(3), x.flatten()])[3:].view(x.shape),
    }
    expected = values(x, compiled)
    for name, layout in layouts.items():
        assert values(layout, compiled) == pytest.approx(expected, rel=2e-6), name
    expanded = x[:1].expand(4, -1, -1, -1)
    assert values(expanded, compiled) == pytest.approx(
        values(expanded.contiguous(), compiled), rel=2e-6
    )


@pytest.mark.parametrize("compiled", [False, True])
def test_no_elements_add_nothing(compiled: bool) -> None:
    row = summarize(torch.empty(0, 4), COLUMNS, compiled)
    assert row[0] == 0
    expected = {"minimum": np.inf, "maximum": -np.inf}
    assert row.tolist() == [expected.get(name, 0.0) for name in SCALARS.columns]
    assert histogram(torch.empty(0)).sum() == 0


def test_counts_above_the_precision_of_float32() -> None:
    x = torch.ones(1, dtype=torch.bfloat16).expand(2**24 + 3)
    assert values(x.contiguous(), compiled=True)["norm"] == pytest.approx((2**24 + 3) ** 0.5)
    assert summarize(x, "count,zeros", False)[0] == 2**24 + 3


def test_the_operators_are_well_behaved() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for arguments in ((x.detach(), "count,sum,absmax", False), (x.detach(), "count,zeros", True)):
        torch.library.opcheck(torch.ops.tmm.summarize.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.tmm.histogram.default, (x.detach(),), test_utils=tests)
    rows = [torch.ones(2), torch.zeros(3)]
    torch.library.opcheck(torch.ops.tmm.pack.default, (rows,), test_utils=tests)
    assert pack(rows).tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e-6, 1.0, 1e9, 1e30])
def test_kurtosis_does_not_depend_on_the_scale(scale: float, compiled: bool) -> None:
    x = sample((64, 128), torch.float64, 0.0)
    expected = values(x, compiled=False)["kurtosis"]
    assert values((x * scale).float(), compiled)["kurtosis"] == pytest.approx(expected, rel=2e-6)
