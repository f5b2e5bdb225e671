"""The kernel of a CPU and plain torch, both against float64; operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import pytest
import torch

from tmm.core.metrics import METRIC_NAMES, builtin_reductions, finalize
from tmm.kernels.dense import flatten
from tmm.kernels.ops import histogram, pack, summarize
from tmm.kernels.summarize import inductor_rows
from tmm.kernels.summarize.host import summarize_on_host
from tmm.kernels.summarize.inductor_rows import summarize_with_inductor
from tmm.kernels.summarize.torch_rows import summarize_rows, summarize_with_torch

SCALARS, _ = builtin_reductions(METRIC_NAMES, is_complex=False)
SHAPES = [(4,), (8, 64, 128), (1001, 4), (3, 5, 7), (2, 3, 50257), (1, 1), ()]


Kernel: TypeAlias = Callable[[torch.Tensor, tuple[str, ...]], torch.Tensor]


def by_host(x: torch.Tensor, columns: tuple[str, ...]) -> torch.Tensor:
    rows = summarize_on_host([flatten(x)], columns)
    assert rows is not None
    return rows[0]


KERNELS = [by_host, summarize_with_torch]


def sample(shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    if x.numel() > 3:
        x.view(-1)[::3] = 0
    return x.to(dtype)


def values(x: torch.Tensor, kernel: Kernel) -> dict[str, float]:
    row = kernel(x, SCALARS.columns).numpy()[None]
    return dict(zip(SCALARS.metrics, finalize(SCALARS, row)[0], strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(
    shape: tuple[int, ...], dtype: torch.dtype, offset: float, kernel: Kernel
) -> None:
    x = sample(shape, dtype, offset)
    expected = values(x.double(), summarize_with_torch)
    got = values(x, kernel)
    for name, want in expected.items():
        scale = expected["mean_abs"] if name == "mean" else abs(want)
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        assert got[name] == pytest.approx(want, abs=tolerance * scale, nan_ok=True), name


def test_a_small_spread_about_a_large_mean_does_not_cancel() -> None:
    x = sample((64, 1024), torch.float64, 0.0).mul(1e-2).add(1000).float()
    for kernel in KERNELS:
        assert values(x, kernel)["std"] == pytest.approx(float(x.double().std()), rel=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(bad: float, kernel: Kernel) -> None:
    x = sample((64, 128), torch.float32, 0.0)
    x[17, 3] = bad
    expected, got = values(x.double(), summarize_with_torch), values(x, kernel)
    assert {n for n, v in got.items() if np.isnan(v)} == {
        n for n, v in expected.items() if np.isnan(v)
    }
    assert {n for n, v in got.items() if np.isinf(v)} == {
        n for n, v in expected.items() if np.isinf(v)
    }


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_layout_gives_the_same(kernel: Kernel) -> None:
    x = sample((4, 8, 16, 32), torch.float32, 0.5)
    layouts = {
        "permuted": x.permute(2, 0, 3, 1),
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "strided": torch.stack([x, x + 1], dim=-1)[..., 0],
        "offset": torch.cat([torch.zeros(3), x.flatten()])[3:].view(x.shape),
    }
    expected = values(x, kernel)
    for name, layout in layouts.items():
        assert values(layout, kernel) == pytest.approx(expected, rel=2e-6), name
    expanded = x[:1].expand(4, -1, -1, -1)
    assert values(expanded, kernel) == pytest.approx(
        values(expanded.contiguous(), kernel), rel=2e-6
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_elements_add_nothing(kernel: Kernel) -> None:
    row = kernel(torch.empty(0, 4), SCALARS.columns)
    assert row[0] == 0
    expected = {"minimum": np.inf, "maximum": -np.inf}
    assert row.tolist() == [expected.get(name, 0.0) for name in SCALARS.columns]
    assert histogram(torch.empty(0)).sum() == 0


@pytest.mark.parametrize("columns", [SCALARS.columns, ("absmax", "sum"), ("mean", "moment2")])
def test_rows_as_a_gpu_cuts_them(columns: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain operations, which Inductor compiles there; 10,007 has no divisor."""
    shapes = []

    def kernel(columns: tuple[str, ...], *rest: object) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(x: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(x.shape))
            return summarize_rows(columns, x)

        return run

    monkeypatch.setattr(inductor_rows, "_kernel", kernel)
    monkeypatch.setattr(inductor_rows, "_ONE_PROGRAM", 10_000)
    for size, expected in (
        (4095, [(1, 4095)]),
        (9001, [(1, 9001)]),
        (10_240, [(4, 2560)]),
        (10_007, [(2, 4096), (1, 1815)]),
    ):
        x = sample((size,), torch.float32, 3.0)
        for bad in (1.0, float("nan"), float("-inf")):
            x[-2] = bad
            shapes.clear()
            got = summarize_with_inductor(x, columns)
            assert got is not None
            want = summarize_with_torch(x.double(), columns)
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6, equal_nan=True)
            assert shapes == expected


def test_counts_above_the_precision_of_float32() -> None:
    x = torch.ones(1, dtype=torch.bfloat16).expand(2**24 + 3)
    assert values(x.contiguous(), by_host)["norm"] == pytest.approx((2**24 + 3) ** 0.5)
    assert summarize(x, "count,zeros")[0] == 2**24 + 3


def test_the_operators_are_well_behaved() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    arguments = (x.detach(), "count,sum,absmax")
    torch.library.opcheck(torch.ops.tmm.summarize.default, arguments, test_utils=tests)
    torch.library.opcheck(torch.ops.tmm.histogram.default, (x.detach(),), test_utils=tests)
    rows = [torch.ones(2), torch.zeros(3)]
    torch.library.opcheck(torch.ops.tmm.pack.default, (rows,), test_utils=tests)
    assert pack(rows).tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1e-6, 1.0, 1e9, 1e30])
def test_kurtosis_does_not_depend_on_the_scale(scale: float, kernel: Kernel) -> None:
    x = sample((64, 128), torch.float64, 0.0)
    expected = values(x, summarize_with_torch)["kurtosis"]
    assert values((x * scale).float(), kernel)["kurtosis"] == pytest.approx(expected, rel=2e-6)
