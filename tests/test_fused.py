"""Statistics that the compiler fuses: every number as by the operator, as memory holds it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import (
    BUILTIN,
    Call,
    assert_agrees,
    record_calls,
    run_calls,
    tolerance,
)
from tests.test_host import check_row, expected
from tests.triton_interpreter import check_in_the_interpreter
from tmm.core.metrics import TENSOR_COLUMNS
from tmm.kernels.fused.choose_lowering import Lowering, fused_row, rows_of
from tmm.kernels.fused.merge_operator import merge, merge_joined_with_torch, merge_with_torch
from tmm.kernels.fused.row_partials import NAME, FusedRow, Rows, partials_of

ALL = TENSOR_COLUMNS
FIVE = ("count", "sum", "sum_squares", "mean", "moment2", "absmax", "zeros")
COLUMN_SETS = (
    ALL,
    FIVE,
    ("count", "sum"),
    ("count", "sum_squares"),
    ("count", "mean", "moment2"),
    ("count", "sum", "sum_squares", "mean", "moment2"),
    ("count", "sum_absolute", "minimum", "maximum", "nans", "infinities"),
    ("count", "mean", "moment2", "moment3", "moment4"),
)
SPECIAL = [0.0, -0.0, np.nan, np.inf, -np.inf]


def row_of(
    x: torch.Tensor,
    columns: tuple[str, ...],
    length: int,
    *,
    is_wide: bool = True,
    order: tuple[int, ...] | None = None,
    by: Callable[..., torch.Tensor] = merge,
) -> dict[str, float]:
    """The row of a tensor by its partials, by column."""
    row = FusedRow(columns, length, is_wide)
    order = tuple(range(x.dim())) if order is None else order
    partials = partials_of(x, *row.arguments(Rows(order, length)))
    assert partials.shape == (len(row.partials), x.numel() // length)
    return dict(zip(columns, by([partials], row.layout).tolist(), strict=True))


@settings(max_examples=150, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    rows=st.integers(1, 40),
    length=st.integers(1, 300),
    exponent=st.floats(-30, 30),
    offset=st.sampled_from([0.0, 1.0, -100.0]),
    special=st.lists(st.tuples(st.integers(0, 11999), st.sampled_from(SPECIAL)), max_size=3),
    columns=st.sampled_from(COLUMN_SETS),
    seed=st.integers(0, 100),
)
def test_any_scale_and_any_special_value(
    dtype: torch.dtype,
    rows: int,
    length: int,
    exponent: float,
    offset: float,
    special: list[tuple[int, float]],
    columns: tuple[str, ...],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    x = (x + offset) * 10.0**exponent
    for where, value in special:
        x.view(-1)[where % x.numel()] = value
    x = x.to(dtype)
    for by in (merge, merge_with_torch):
        check_row(row_of(x, columns, length, by=by), x)


@pytest.mark.parametrize("is_wide", [True, False])
@pytest.mark.parametrize("columns", COLUMN_SETS)
def test_in_cpp_as_by_torch(columns: tuple[str, ...], *, is_wide: bool) -> None:
    torch.manual_seed(0)
    for scale, offset in ((1.0, 0.0), (1e-3, 1e3), (1e15, 0.0), (0.0, 7.5), (0.0, 0.0)):
        x = torch.randn(37, 96) * scale + offset
        for special in (None, *SPECIAL):
            if special is not None:
                x[5, 7] = special
            own = row_of(x, columns, 96, is_wide=is_wide)
            right = row_of(x, columns, 96, is_wide=is_wide, by=merge_with_torch)
            for name in columns:
                near = 0.0
                if name == "moment3":  # deviations are of a mean that is rounded
                    near = 1e-14 * abs(right["mean"]) * right["moment2"]
                about = pytest.approx(right[name], rel=1e-9, abs=near, nan_ok=True)
                assert own[name] == about, (name, scale, special)


def test_float32_partials_do_not_cancel() -> None:
    """As on a GPU, where deviations are of float32."""
    torch.manual_seed(0)
    for mean, deviation in ((1e6, 1.0), (1e3, 1e-3), (-1e4, 0.1), (1.0, 1e-5)):
        x = torch.randn(64, 512) * deviation + mean
        got, want = row_of(x, ALL, 512, is_wide=False), expected(x)
        for name in ("sum", "sum_squares", "mean", "moment2", "moment4"):
            assert got[name] == pytest.approx(want[name], rel=3e-6), (name, mean, deviation)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e6, 3e38, 1e-40])
@pytest.mark.parametrize("is_wide", [True, False])
def test_constants_have_no_deviation(value: float, *, is_wide: bool) -> None:
    x = torch.full((50, 700), value)
    row = row_of(x, ("count", "mean", "moment2"), 700, is_wide=is_wide)
    if not is_wide and value > 1e38:  # whose sum is beyond float32, as for the operator of a GPU
        assert np.isnan(row["mean"])
        assert np.isnan(row["moment2"])
        return
    assert row["moment2"] == 0.0
    assert row["mean"] == pytest.approx(float(x[0, 0]), rel=1e-6, abs=1e-44)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("by", [merge, merge_with_torch])
def test_rows_in_half_precision(dtype: torch.dtype, by: Callable[..., torch.Tensor]) -> None:
    columns = ("count", "sum", "sum_squares", "mean", "moment2", "absmax")
    row = FusedRow(columns, 768, is_wide=False, is_half=True)
    assert row.partials == ("centre", "absmax", "spread")
    constant = torch.full((8, 768), 0.1, dtype=dtype)
    one_off = constant.clone()
    one_off[3, 5] = torch.nextafter(one_off[3, 5], torch.ones((), dtype=dtype))
    for x in (constant, one_off, torch.randn(8, 768).to(dtype), -3 + 1e-2 * one_off):
        got = by([partials_of(x, *row.arguments(Rows((0, 1), 768)))], row.layout)
        wide, found = x.double(), dict(zip(columns, got.tolist(), strict=True))
        assert found["mean"] == pytest.approx(float(wide.mean()), rel=1e-6, abs=1e-8)
        assert found["sum_squares"] == pytest.approx(float(wide.square().sum()), rel=1e-6)
        right = float((wide - wide.mean()).square().sum())
        assert found["moment2"] == pytest.approx(right, rel=1e-3, abs=1e-20)


def test_more_elements_than_float32_counts() -> None:
    elements = (1 << 24) + 1
    x = torch.ones(elements)
    x[7] = 0
    rows = rows_of(x)
    assert isinstance(rows, Rows)
    row = row_of(x, FIVE, rows.length)
    assert (row["count"], row["sum"], row["sum_squares"]) == (elements, elements - 1, elements - 1)
    assert (row["zeros"], row["absmax"]) == (1, 1)
    assert row["moment2"] == pytest.approx(1 - 1 / elements, rel=1e-9)


def test_layouts_that_do_not_fit_are_refused() -> None:
    x = torch.ones(3, 4, dtype=torch.float64)
    for parts, layout in (
        ([x], [8, 2, 6, 7, 1, 0]),  # three partials, two told
        ([x], [8, 3, 6, 7]),  # too short
        ([x], [*FusedRow(FIVE, 8, is_wide=True).layout, 1]),  # too long
        ([x], [8, 3, 6, 7, 99, 1, 0]),  # an unknown one
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            merge(parts, layout)


LAYOUTS: dict[str, tuple[torch.Tensor, Rows | str]] = {
    "sequence": (torch.empty(4, 16, 256), Rows((0, 1, 2), 256)),
    "images": (torch.empty(2, 3, 16, 16), Rows((0, 1, 2, 3), 256)),
    "channels last": (
        torch.empty(2, 256, 5, 5).to(memory_format=torch.channels_last),
        Rows((0, 2, 3, 1), 256),
    ),
    "heads": (torch.empty(2, 64, 4, 32).transpose(1, 2), Rows((0, 2, 1, 3), 128)),
    "heads apart": (torch.empty(2, 4, 64, 32), Rows((0, 1, 2, 3), 32)),
    "transposed": (torch.empty(256, 64).t(), Rows((1, 0), 64)),
    "small": (torch.empty(3, 5), Rows((0, 1), 15)),
    "scalar": (torch.empty(()), Rows((), 1)),
    "one long": (torch.empty(1 << 16), Rows((0,), 4096)),
    "prime": (torch.empty(65537), "it is one row of 65537 elements"),
    "expanded": (torch.empty(9000, 1).expand(9000, 64), "its rows are 1 elements long"),
    "every other": (torch.empty(900, 64)[:, ::2], "its rows are 1 elements long"),
    "narrow": (torch.empty(9000, 3), Rows((0, 1), 3375)),
    "narrow and long": (torch.empty(9001, 3), "its rows are 3 elements long"),
    "empty": (torch.empty(0, 4), "it has no elements"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_those_of_memory(name: str) -> None:
    x, rows = LAYOUTS[name]
    assert rows_of(x) == rows
    if isinstance(rows, Rows):
        x.normal_()
        check_row(row_of(x, FIVE, rows.length, order=rows.order), x)


@pytest.mark.parametrize(
    ("shape", "length"),
    [
        ((8, 1024, 3072), 4 * 3072),
        ((2048, 1536), 2 * 1536),  # a thousand rows are left
        ((6000, 3000), 5 * 3000),
        ((1500, 3000), 3000),
        ((4099, 3000), 3000),  # a prime number of rows
        ((4096, 1024), 1024),  # stays in registers
        ((4096, 50304), 50304),
        ((8, 1024, 12, 256), 256),
    ],
)
def test_long_rows_that_nothing_needs_are_joined(shape: tuple[int, ...], length: int) -> None:
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16)
    order = tuple(range(x.dim()))
    assert rows_of(x, is_free=True) == Rows(order, length)
    assert rows_of(x) == Rows(order, shape[-1])
    found = fused_row(x, FIVE, x.numel(), "auto", is_free=True)
    assert not isinstance(found, str)
    assert found[1].length == length


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 10.0), (0.0, 3.0), (100.0, -7.0)])
def test_joined_rows_measure_as_well(dtype: torch.dtype, scale: float, offset: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 1024, 1280) * scale + offset).to(dtype)
    x[1, 5, 7] = 0.0
    rows = rows_of(x, is_free=True)
    assert rows == Rows((0, 1, 2), 2 * 1280)
    for by in (merge, merge_with_torch):
        check_row(row_of(x, FIVE, rows.length, is_wide=False, by=by), x)


def test_why_an_operator_stays() -> None:
    x = torch.empty(8, 256)

    def why(x: torch.Tensor, lowering: str, columns: tuple[str, ...] = FIVE) -> str:
        found = fused_row(x, columns, x.numel(), lowering)  # type: ignore[arg-type]
        return found if isinstance(found, str) else ""

    assert not why(x, "fused")
    assert why(x, "auto").startswith("small")
    assert why(x, "operator") == "as lowering= asks for"
    assert "large" in why(torch.empty(1024, 256), "auto")
    assert not why(torch.empty(1024, 256), "fused")
    for dtype in (torch.float64, torch.complex64, torch.int64):
        assert str(dtype).removeprefix("torch.") in why(x.to(dtype), "fused")
    on_gpu = torch.empty(8, 4096, device="meta")
    assert not why(on_gpu, "auto")
    assert "fourth" in why(on_gpu, "fused", ALL)
    with pytest.raises(ValueError, match="lowering='fast' is neither"):
        tmm.instrument(nn.Linear(2, 2), tmm.Spec(tmm.activation("rms")), lowering="fast")  # type: ignore[arg-type]


class Parts(nn.Module):
    """Products beyond half precision: infinite, or zero, where they are stored."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        limits = torch.finfo(dtype)
        self.large = Times(limits.max / 2)
        self.small = Times(limits.smallest_normal * limits.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.large(x).sigmoid() + self.small(x).exp()).float().mean()


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_counts_what_memory_would_hold(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = Parts(dtype), (torch.randn(64, 256) * 2).to(dtype)
    names = ("absmax", "zero_fraction", "inf_count", "rms", "min", "max")
    spec = tmm.Spec(tmm.activation(*names, modules="large|small"))
    model = tmm.instrument(torch.compile(module), spec, lowering="fused")
    with tmm.monitor(model).step(0):
        model(x)
    got = tmm.monitor(model).get_step_metrics()
    large, small = (x * part.factor for part in (module.large, module.small))
    assert int(large.isinf().sum()) > 100
    assert 0.05 < float((small == 0).double().mean()) < 0.95
    for name, right in (("large", large), ("small", small)):
        assert got[f"activation/{name}/inf_count"] == int(right.isinf().sum())
        assert got[f"activation/{name}/zero_fraction"] == float((right == 0).double().mean())
        assert got[f"activation/{name}/max"] == float(right.max())
        assert got[f"activation/{name}/absmax"] == float(right.abs().max())
    assert all(not why for graph in tmm.explain(model).graphs for *_, why in graph.lowerings)


def check_triton() -> None:
    """The launch of a GPU, in Triton's interpreter, which takes a tenth of a second for a tensor.

    All kinds of tensors with all columns, and some of each number of rows with fewer ones.
    """
    from tmm.kernels.fused import merge_triton

    torch.manual_seed(0)
    tensors = []
    for rows, scale, offset in ((1, 1.0, 0.0), (37, 1e-3, 1e3), (2100, 1.0, 0.0), (5, 0.0, 7.5)):
        for special in (None, np.nan, np.inf, -np.inf):
            x = torch.randn(rows, 64) * scale + offset
            if special is not None:
                x[0, 7] = special
            tensors += [x, x.bfloat16()]
    for turn, columns in enumerate(COLUMN_SETS):
        parts: list[torch.Tensor] = []
        layouts: list[list[int]] = []
        for x in tensors if columns == ALL else tensors[turn % 5 :: 5]:
            row = FusedRow(columns, 64, is_wide=False, is_half=x.dtype == torch.bfloat16)
            parts.append(partials_of(x, *row.arguments(Rows((0, 1), 64))))
            layouts.append(row.layout)
        layout = [number for one in layouts for number in one]
        joined = torch.cat([part.reshape(-1) for part in parts])
        number = [part.shape[1] for part in parts]
        got = merge_triton.merge_joined_with_triton(joined, None, number, layout)
        assert got is not None
        want = merge_with_torch(parts, layout)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-14, equal_nan=True)
        plain = merge_joined_with_torch(joined, None, number, layout)
        torch.testing.assert_close(plain, want, rtol=0, atol=0, equal_nan=True)
        places = [place for place in range(1, len(parts), 3) for _ in range(2)]  # some, twice
        starts = torch.tensor([sum(part.numel() for part in parts[:place]) for place in places])
        number = [number[place] for place in places]
        layout = [number for place in places for number in layouts[place]]
        want = merge_with_torch([parts[place] for place in places], layout)
        again = merge_triton.merge_joined_with_triton(joined, starts, number, layout)
        assert again is not None
        torch.testing.assert_close(again, want, rtol=1e-9, atol=1e-14, equal_nan=True)
        plain = merge_joined_with_torch(joined, starts, number, layout)
        torch.testing.assert_close(plain, want, rtol=0, atol=0, equal_nan=True)
    assert merge_triton.merge_joined_with_triton(joined.double(), None, number, layout) is None


def test_the_launch_of_a_gpu() -> None:
    check_in_the_interpreter("tests.test_fused")


class Unreached(nn.Module):
    """A layer whose output the loss does not depend on, and one whose output is overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(16, 64), nn.Linear(16, 48)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.unused(x)
        y = self.act(self.used(x))
        y.mul_(2)
        return y


class Breaking(nn.Module):
    """Two graphs, the first of which is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.first(x).tanh())
        torch._dynamo.graph_break()
        return self.last(x)


class Recomputed(nn.Module):
    """A block inside of activation checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = checkpoint(self.block, x, use_reentrant=False)
        return result + x


class Positions(nn.Module):
    """What is added to each item of a batch: its gradient is a sum over them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Linear(16, 64), nn.Embedding(8, 64)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tokens(x) + self.positions(torch.arange(8, device=x.device))
        result: torch.Tensor = self.head(self.norm(x))
        return result


PROGRAMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layers": (
        lambda: nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)),
        (32, 16),
    ),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
        (4, 3, 18, 18),
    ),
    "unreached": (Unreached, (32, 16)),
    "breaking": (Breaking, (32, 16)),
    "positions": (Positions, (6, 8, 16)),
    "recomputed": (Recomputed, (4, 8, 16)),
}


def rows_of_training(
    name: str,
    lowering: str,
    *,
    dtype: torch.dtype = torch.float32,
    changes: bool = True,
    **options: Any,
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The values of two steps, and of a third one if the size ``changes``; the last gradients."""
    torch._dynamo.reset()
    build, shape = PROGRAMS[name]
    torch.manual_seed(0)
    module = build().to(dtype)
    spec = tmm.Spec(
        tmm.activation(*BUILTIN, own=lambda x: x.abs().sum()),
        tmm.activation_gradient(*BUILTIN),
    )
    model = tmm.instrument(torch.compile(module, **options), spec, lowering=lowering)  # type: ignore[arg-type]
    monitor, values = tmm.monitor(model), {}
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    monitor.watch(optimizer, scaler=scaler)
    batches = [shape[0], shape[0], shape[0] + 5]
    for step, batch in enumerate(batches if changes else batches[:2]):
        x = torch.randn(batch, *shape[1:], generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        with monitor.step(step):
            scaler.scale(model(x).float().square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        found = monitor.get_step_metrics()
        values |= {f"{step} {key}": value for key, value in found.items()}
    gradients = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    return values, gradients


def programs_of_trainings() -> list[Any]:
    """Each program by default in one dtype, by turns, and some with sizes that change.

    Compiling takes long: a size that changes has all compiled once more.
    """
    parameters = []
    for place, name in enumerate(PROGRAMS):
        dtypes = torch.float32, torch.bfloat16
        # Gradients of images in half precision have no rows.
        own = torch.float32 if name == "convolutions" else dtypes[place % 2]
        usual = own, place % 3 == 0
        kinds = [usual, *((dtype, True) for dtype in dtypes if (dtype, True) != usual)]
        for kind in kinds:
            marks = () if kind == usual else pytest.mark.slow
            identity = f"{name}-{kind[0]}-{'changing' if kind[1] else 'fixed'}"
            parameters.append(pytest.param(name, *kind, marks=marks, id=identity))
    return parameters


@pytest.mark.parametrize(("name", "dtype", "changes"), programs_of_trainings())
def test_a_training_as_by_operators(name: str, dtype: torch.dtype, changes: bool) -> None:
    right, gradients = rows_of_training(name, "operator", dtype=dtype, changes=changes)
    exact = dtype == torch.float32
    has_gradients = exact or name != "convolutions"
    assert (len([key for key in right if "activation_gradient/" in key]) > 10) == has_gradients
    # Without a GPU, "auto" chooses operators as well; of layers, `test_sizes_that_change` has it.
    for lowering in ("fused", "auto") if changes and name != "layers" else ("fused",):
        values, own = rows_of_training(name, lowering, dtype=dtype, changes=changes)
        assert values.keys() == right.keys()
        for key, value in right.items():
            # In half precision, one program rounds where the other does not.
            near = 1e-5 if exact else 2e-2
            if isinstance(value, np.ndarray) and not exact:
                assert values[key].sum() == value.sum()
                continue
            assert values[key] == pytest.approx(value, rel=near, abs=near / 10, nan_ok=True), key
        for one, other in zip(own, gradients, strict=True):
            distance = (one.double() - other.double()).norm()
            assert distance <= (1e-6 if exact else 2e-2) * other.double().norm()


def test_sizes_that_change() -> None:
    right, _ = rows_of_training("layers", "operator", dynamic=True)
    for lowering in ("fused", "auto"):
        values, _ = rows_of_training("layers", lowering, dynamic=True)
        assert values.keys() == right.keys()
        for key, value in right.items():
            about = pytest.approx(value, rel=1e-5, abs=1e-6, nan_ok=True)
            assert values[key] == about, (lowering, key)


@pytest.mark.parametrize(
    ("name", "lowering"),
    [
        *[("layers", "fused"), ("layers", "auto"), ("convolutions", "fused")],
        pytest.param("convolutions", "auto", marks=pytest.mark.slow),
    ],
)
def test_activations_as_eager_hooks_see_them(name: str, lowering: str) -> None:
    build, shape = PROGRAMS[name]
    torch.manual_seed(0)
    module, x = build(), torch.randn(shape)
    reference = copy.deepcopy(module)
    spec = tmm.Spec(tmm.activation(*BUILTIN))
    model = tmm.instrument(torch.compile(module), spec, lowering=lowering)  # type: ignore[arg-type]
    calls: list[Call] = [lambda model: model(x)]
    for step in range(2):
        with tmm.monitor(model).step(step):
            run_calls(model, calls, seed=step)
        recording = record_calls(reference, calls, seed=step)
        got = tmm.monitor(model).get_step_metrics()
        assert_agrees(got, recording.expected(), tolerance("inductor"))


def test_references_and_the_coordinate_check() -> None:
    def rows(lowering: str) -> dict[str, float]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
        spec = tmm.Spec(
            *(tmm.activation("std"), tmm.activation_difference("relative_norm"), tmm.rcc()),
            reference="init",
        )
        model = tmm.instrument(torch.compile(module), spec, lowering=lowering)  # type: ignore[arg-type]
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        monitor = tmm.monitor(model)
        for step in range(3):
            with monitor.step(step):
                model(torch.ones(8, 16)).square().mean().backward()
                optimizer.step()
        return dict(monitor.get_step_metrics())

    right = rows("operator")
    assert len(right) > 10
    for lowering in ("fused", "auto"):
        values = rows(lowering)
        assert values.keys() == right.keys()
        for key, value in right.items():
            about = pytest.approx(value, rel=1e-4, abs=1e-7, nan_ok=True)
            assert values[key] == about, (lowering, key)


def test_explain_says_how_each_site_is_measured() -> None:
    module = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1))
    spec = tmm.Spec(tmm.activation("std", "histogram", own=lambda x: x.sort().values[0]))
    model = tmm.instrument(torch.compile(module), spec, lowering="fused")
    tmm.monitor(model).prepare(torch.randn(8, 16))
    explanation = tmm.explain(model)
    text = str(explanation)
    assert "fused into other kernels: activation/0, activation/1" in text
    (graph,) = explanation.graphs
    assert NAME in graph.diff
    assert "merge" in graph.diff


class Images(nn.Module):
    """The beginning of a ResNet. Its convolutions get channels last under Inductor."""

    def __init__(self, width: int, *, inplace: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm, self.relu = nn.BatchNorm2d(width), nn.ReLU(inplace)
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(width, 48, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(self.pool(self.relu(self.norm(self.stem(x)))))
        return output.mean((2, 3))


@pytest.mark.parametrize("lowering", ["auto", "operator", "fused"])
@pytest.mark.parametrize(
    ("dtype", "width", "inplace"),
    [(torch.bfloat16, 32, True), (torch.bfloat16, 64, False), (torch.float16, 32, False)],
)
@pytest.mark.filterwarnings("ignore")
def test_gradients_of_images_in_half_precision(
    dtype: torch.dtype, width: int, lowering: Lowering, *, inplace: bool
) -> None:
    """Measured in one way or another, they made Inductor's sums anything, and so the training."""
    torch.manual_seed(0)
    net, x = Images(width, inplace=inplace), torch.randn(4, 3, 16, 16)
    plain = copy.deepcopy(net)

    def step(callee: Callable[..., torch.Tensor]) -> None:
        with torch.autocast("cpu", dtype=dtype):
            loss = callee(x).float().square().mean()
        loss.backward()

    step(plain)
    spec = tmm.Spec(tmm.activation_gradient("rms"))
    model = tmm.instrument(torch.compile(net), spec, lowering=lowering)
    with tmm.monitor(model).step(0):
        step(model)
    assert "activation_gradient/norm/rms" not in tmm.monitor(model).get_step_metrics()
    unmeasured = tmm.explain(model).unmeasured
    assert "an image in half precision" in unmeasured["norm"]
    for own, other in zip(net.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(own.grad, other.grad, rtol=0.05, atol=1e-3)
