"""Rows of many tensors at once against plain torch in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from benchmarks.parameters import peak_memory
from tests.triton_interpreter import check_in_the_interpreter
from tmm.core.merging import merge
from tmm.core.metrics import METRIC_NAMES, builtin_reductions
from tmm.kernels.dense import real
from tmm.kernels.summarize.group import merge_rows, summarize_group
from tmm.kernels.summarize.torch_rows import summarize_with_torch

(EIGHT,) = builtin_reductions(
    ("mean", "std", "rms", "norm", "mean_abs", "absmax", "min", "max"), is_complex=False
)
ALL, _ = builtin_reductions(METRIC_NAMES, is_complex=False)
COLUMN_SETS = {"eight": EIGHT.columns, "all": ALL.columns}
EXACT = ("count", "absmax", "minimum", "maximum", "zeros", "nans", "infinities")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64]
SHAPES = [(), (0,), (1,), (7,), (2, 4), (768,), (768,), (3, 0), (64, 64), (4096,), (31, 331)]
LARGE = [(300, 1000), (3 * 4096 * 32,), (2, 4096, 17)]


def sample(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, offset: float = 0.0
) -> torch.Tensor:
    x = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64) + offset
    if x.numel() > 3:
        x.view(-1)[::3] = 0
    return x.to(dtype)


def expected(tensors: Sequence[torch.Tensor], columns: tuple[str, ...]) -> torch.Tensor:
    """Rows of the tensors in float64."""
    return torch.stack([summarize_with_torch(real(exact(tensor)), columns) for tensor in tensors])


def exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)


def check(got: torch.Tensor, tensors: Sequence[torch.Tensor], columns: tuple[str, ...]) -> None:
    want = expected(tensors, columns)
    assert got.dtype == torch.float64
    assert got.shape == want.shape
    of = {name: index for index, name in enumerate(columns)}
    for row, right, tensor in zip(got.tolist(), want.tolist(), tensors, strict=True):
        # Sums cancel: what rounding costs them is relative to the sum of the magnitudes.
        magnitudes = float(exact(tensor).abs().sum())
        tolerance = 1e-12 if tensor.dtype == torch.float64 else 1e-6
        if tensor.is_complex():
            tolerance = 5e-6  # the magnitudes themselves are rounded
        for name, index in of.items():
            scale = abs(right[index])
            if name in ("sum", "mean") and math.isfinite(magnitudes):
                scale = magnitudes / (max(tensor.numel(), 1) if name == "mean" else 1)
            if name == "moment3" and not math.isnan(scale):
                scale = right[of["moment4"]] ** 0.75 * right[of["count"]] ** 0.25
            near = 0.0 if name in EXACT and not tensor.is_complex() else 4 * tolerance * scale
            if name.startswith("moment"):  # of a constant, even float64 leaves some rounding
                power = int(name[-1])
                near += (1e-12 * float(exact(tensor).abs().sum())) ** power if near == near else 0
            near = near if math.isfinite(near) else 0.0
            wanted = pytest.approx(right[index], rel=0, abs=near, nan_ok=True)
            assert row[index] == wanted, (name, tensor.shape, tensor.dtype)


@pytest.mark.parametrize("columns", COLUMN_SETS.values(), ids=COLUMN_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_rows_are_those_of_each_tensor(
    columns: tuple[str, ...], dtype: torch.dtype, offset: float
) -> None:
    tensors = [sample(shape, dtype, offset) for shape in SHAPES + LARGE]
    check(summarize_group(tensors, columns), tensors, columns)


def mixed() -> list[torch.Tensor]:
    """Dtypes and strides of all kinds, among them views that are not aligned."""
    x = sample((37, 4096))
    leaf = torch.nn.Parameter(sample((50, 100)))
    strided = [
        x.t(),
        x[:, ::3],
        x[1:, 1:],
        x.view(-1)[1:70_000],
        x.view(37, 64, 64).transpose(0, 2),
    ]
    return [
        *(sample(shape, dtype) for dtype in DTYPES for shape in SHAPES),
        *strided,
        leaf,
        x[0, 0].expand(100),
    ]


def test_mixed_dtypes_and_strides() -> None:
    tensors = mixed()
    check(summarize_group(tensors, EIGHT.columns), tensors, EIGHT.columns)


def test_integers_count_as_their_values() -> None:
    tensors = [torch.arange(-50, 9000), torch.tensor([True, False, True])]
    check(summarize_group(tensors, EIGHT.columns), tensors, EIGHT.columns)


def with_extremes() -> list[torch.Tensor]:
    """One value that is not finite, or nearly so, in the sampled elements or far from them."""
    tensors = []
    for bad in (math.nan, math.inf, -math.inf):
        for size in (5, 3000, 4096, 300_001):
            for where in {0, size // 2, size - 1}:
                for offset in (0.0, -3.0, 3.0):
                    x = sample((size,), offset=offset)
                    x[where] = bad
                    tensors.append(x)
    both = sample((9000,))
    both[3], both[5000] = math.inf, -math.inf
    return [*tensors, both]


@pytest.mark.parametrize("columns", COLUMN_SETS.values(), ids=COLUMN_SETS)
def test_values_that_are_not_finite(columns: tuple[str, ...]) -> None:
    tensors = with_extremes()
    check(summarize_group(tensors, columns), tensors, columns)


def awkward() -> list[torch.Tensor]:
    """Rows whose sampled elements say little about the rest, and constants."""
    ramp = torch.linspace(-1, 1, 200_000)
    step = torch.cat([torch.full((256,), 1e4), torch.randn(3840)]).repeat(20)
    sparse = torch.zeros(100_000)
    sparse[70_000:70_100] = torch.randn(100) * 1e-15
    narrow = torch.randn(65_536) * 1e-2 + 1000
    constant = torch.full((70_001,), 0.1)
    return [ramp, step, sparse, narrow, constant, -constant[:5000], torch.zeros(5000)]


@pytest.mark.parametrize("columns", COLUMN_SETS.values(), ids=COLUMN_SETS)
def test_awkward_values(columns: tuple[str, ...]) -> None:
    tensors = awkward()
    check(summarize_group(tensors, columns), tensors, columns)


def test_many_parts_are_joined_as_pairs_are() -> None:
    tensors = [sample((n,), offset=n % 5) for n in (10, 33, 900, 5000, 77)]
    rows = expected(tensors, ALL.columns)
    owner = torch.tensor([1, 0, 1, 3, 1])
    joined = merge_rows(rows, owner, 5, ALL.columns)
    pairs = rows.numpy()[:, None]
    want = merge(ALL, [pairs[0], pairs[2], pairs[4]])
    torch.testing.assert_close(joined[1], torch.from_numpy(want[0]))
    torch.testing.assert_close(joined[0], rows[1])
    empty = summarize_with_torch(torch.empty(0), ALL.columns)
    assert torch.equal(joined[2], empty)
    assert torch.equal(joined[4], empty)


def test_columns_without_a_count() -> None:
    tensors = [sample((5000,)), sample((3,))]
    for columns in [("sum_squares",), ("absmax", "sum"), ("mean", "moment2")]:
        check(summarize_group(tensors, columns), tensors, columns)


def test_nothing_and_only_empty_tensors() -> None:
    assert summarize_group([], EIGHT.columns).shape == (0, len(EIGHT.columns))
    tensors = [torch.empty(0), torch.empty(3, 0)]
    check(summarize_group(tensors, EIGHT.columns), tensors, EIGHT.columns)


def test_tensors_on_several_devices() -> None:
    with pytest.raises(ValueError, match="one device, not on cpu, meta"):
        summarize_group([torch.ones(2), torch.ones(2, device="meta")], ("sum",))


def test_inside_autograd_and_inference_mode() -> None:
    parameter = torch.nn.Parameter(sample((100, 100)))
    assert not summarize_group([parameter], EIGHT.columns).requires_grad
    with torch.inference_mode():
        tensors = [sample((100, 100)), parameter]
        check(summarize_group(tensors, EIGHT.columns), tensors, EIGHT.columns)


def test_no_large_temporaries() -> None:
    tensors = [torch.randn(1 << 24), torch.randn(1 << 20, 4).t()]
    tensors += [torch.randn(768) for _ in range(1000)]
    summarize_group(tensors, EIGHT.columns)
    extra = peak_memory(lambda: summarize_group(tensors, EIGHT.columns))
    assert 0 < extra < 0.1 * sum(tensor.nbytes for tensor in tensors)


def test_triton_kernel_in_the_interpreter() -> None:
    check_in_the_interpreter("tests.test_group")


def check_triton() -> None:
    from tmm.kernels.summarize.group_triton import summarize_group_with_triton

    torch.manual_seed(0)
    for tensors in (mixed(), few_extremes(), awkward(), [torch.empty(0)]):
        check(summarize_group_with_triton(tensors, ALL.columns), tensors, ALL.columns)
    tensors = [*mixed()[::3], *few_extremes()[::2], *awkward()[1:3]]
    check(summarize_group_with_triton(tensors, EIGHT.columns), tensors, EIGHT.columns)


def few_extremes() -> list[torch.Tensor]:
    """Those of several chunks take the interpreter long."""
    tensors = with_extremes()
    large = [tensor for tensor in tensors if len(tensor) > 10_000]
    return [*(tensor for tensor in tensors[::3] if len(tensor) <= 10_000), *large[::9]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu() -> None:
    tensors = [tensor.cuda() for tensor in mixed() + with_extremes()]
    for columns in (ALL.columns, EIGHT.columns):
        with torch.cuda.device(0):
            torch.cuda.set_sync_debug_mode("error")
            try:
                rows = summarize_group(tensors, columns)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        check(rows.cpu(), [tensor.cpu() for tensor in tensors], columns)


def test_rows_are_on_a_cpu_whatever_the_default_device_is() -> None:
    tensors = [torch.ones(5), torch.ones(3).double()]
    torch.set_default_device("meta")
    try:
        rows = summarize_group(tensors, ("count", "sum"))
        one = summarize_group(tensors[:1], ("count", "sum"))
        alone = torch.ops.tmm.summarize.default(tensors[0], "count,sum")
    finally:
        torch.set_default_device(None)
    assert rows.tolist() == [[5, 5], [3, 3]]
    assert one.tolist() == [[5, 5]]
    assert alone.tolist() == [5, 5]
