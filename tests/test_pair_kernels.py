"""Rows of pairs, whose differences nobody writes down, against plain torch in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tmm
from benchmarks.parameters import peak_memory
from tests.mocked_device import Interpreted, mocked_device, to_device
from tests.test_group import ALL, EIGHT, check, exact, sample
from tests.test_waits import Many
from tests.triton_interpreter import check_in_the_interpreter
from tmm.core.metrics import PAIR_COLUMNS
from tmm.kernels.ops import summarize_difference
from tmm.kernels.pairs import reduce_pair
from tmm.kernels.summarize.differences import Pairs, difference
from tmm.kernels.summarize.group import summarize_pairs

EVERY = (*ALL.columns, *PAIR_COLUMNS)
FEW = ("count", "sum_squares", "reference_sum_squares")
Kernel = Callable[[Pairs, tuple[str, ...]], torch.Tensor | None]


def check_pairs(kernel: Kernel, pairs: Pairs, columns: tuple[str, ...]) -> None:
    rows = kernel(pairs, columns)
    assert rows is not None
    of_difference = tuple(name for name in columns if name not in PAIR_COLUMNS)
    if of_difference:
        check(rows[:, : len(of_difference)], [difference(*pair) for pair in pairs], of_difference)
    for row, (own, other) in zip(rows, pairs, strict=True):
        own, other = exact(own), exact(other)
        squares = own.abs() ** 2, other.abs() ** 2
        products = (own * other.conj()).real if own.is_complex() else own * other
        wanted = {
            "reference_sum_squares": squares[1].sum(),
            "own_sum_squares": squares[0].sum(),
            "dot": products.sum(),
        }
        scale = float((squares[0].sum() * squares[1].sum()).sqrt())
        for name in columns[len(of_difference) :]:
            near = 4e-6 * (scale if name == "dot" else float(wanted[name]))
            near = near if math.isfinite(near) else 0.0
            found = float(row[columns.index(name)])
            expected = pytest.approx(float(wanted[name]), rel=0, abs=near, nan_ok=True)
            assert found == expected, (name, own.shape, own.dtype)


def stepped(tensors: Sequence[torch.Tensor], size: float = 1e-3) -> Pairs:
    """Each with what it was before a small step."""
    pairs = []
    for x in tensors:
        before = (x + size * torch.randn_like(x)).as_strided(x.shape, x.stride())
        pairs.append((x, before))
    return pairs


def alike() -> Pairs:
    """Pairs that kernels read as they lie: dtypes, sizes, orders and places of all kinds."""
    x = sample((64, 1000))
    floats = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    tensors = [sample(s, d) for d in floats for s in ((), (1,), (7,), (0,), (3, 0), (64, 64))]
    tensors += [x, x.t(), x.view(-1)[1:50_000], x.view(64, 10, 100).transpose(0, 2)]
    tensors += [sample((70_001,), offset=1000.0), torch.full((40_000,), 0.1)]
    pairs = [*stepped([x.clone(memory_format=torch.preserve_format) for x in tensors])]
    pairs += [(x.view(-1)[3:40_000], x.view(-1)[:39_997])]  # one is not aligned
    return [(a, b.to(a.dtype)) for a, b in pairs]


def of_several_dtypes() -> Pairs:
    x, y = sample((7, 500)), sample((7, 500), torch.float64)
    return [(x.bfloat16(), x), (x, x.half()), (x.half(), y), (y, x.bfloat16()), (x, x)]


def with_bad_values() -> Pairs:
    pairs = []
    for bad in (math.nan, math.inf, -math.inf):
        for size, place in ((5, 0), (5000, 4000), (40_000, 39_999)):
            for side in (0, 1):
                pair = sample((size,)), sample((size,))
                pair[side][place] = bad
                pairs.append(pair)
    same = torch.full((9000,), math.inf)
    return [*pairs, (same, same.clone()), (same, -same)]


def apart() -> Pairs:
    """Pairs that no kernel reads as they lie."""
    x, z = sample((300, 70)), sample((50, 40), torch.complex64)
    return [(x, x.t().contiguous().t()), (x[:, ::2], x[:, 1::2]), (z, z * 1.001), (x, x.double())]


@pytest.mark.parametrize("columns", [EVERY, EIGHT.columns, FEW, ("dot",), ("absmax", "dot")])
def test_rows_of_pairs(columns: tuple[str, ...]) -> None:
    """Those that are read together and those that are not, in their order."""
    torch.manual_seed(0)
    pairs = [*alike(), *apart(), *of_several_dtypes()]
    check_pairs(summarize_pairs, pairs[::2] + pairs[1::2], columns)
    check_pairs(summarize_pairs, apart(), columns)
    check_pairs(summarize_pairs, with_bad_values(), columns)


def test_triton_kernel_in_the_interpreter() -> None:
    check_in_the_interpreter("tests.test_pair_kernels")


def check_triton() -> None:
    from tmm.kernels.summarize import group_triton
    from tmm.kernels.summarize.group_triton import summarize_pairs_with_triton

    torch.manual_seed(0)
    pairs = alike()
    for some in (pairs[::3], of_several_dtypes()[:4], with_bad_values()[::2]):
        check_pairs(summarize_pairs_with_triton, some, EVERY)
    for pair in (pairs[-3], pairs[-4], apart()[0], of_several_dtypes()[0]):  # without a table
        check_pairs(summarize_pairs_with_triton, [pair], EVERY)
    group_triton._JOINED = 2  # so that the rows of chunks are not all joined at once
    for columns in (EIGHT.columns, FEW, ("dot",)):
        check_pairs(summarize_pairs_with_triton, pairs[-2:-8:-2], columns)
    assert summarize_pairs_with_triton(apart(), FEW) is None
    peak = peak_memory(lambda: summarize_pairs_with_triton(pairs[-4:], EVERY))
    assert 0 < peak < 0.05 * sum(own.nbytes for own, _ in pairs[-4:])


def test_stacked_tensors_need_no_table_in_the_interpreter() -> None:
    check_in_the_interpreter("tests.test_pair_kernels", "check_stacked")


def check_stacked() -> None:
    """Nothing is copied to the device: tables could not be, while a CUDA graph is recorded."""
    from tmm.kernels.summarize import group_triton

    def no_copies(*_: object) -> torch.Tensor:
        raise AssertionError("a table is copied")

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_triton, "on_device", no_copies)
        for shape, dtype in (
            ((5, 33_000), torch.float32),
            ((3, 70_001), torch.bfloat16),  # the second one is not aligned
            ((12, 7), torch.float16),
            ((1, 32_768), torch.float64),
        ):
            heads = list(sample(shape, dtype, offset=3.0))
            for columns in (ALL.columns, EIGHT.columns):
                check(group_triton.summarize_group_with_triton(heads, columns), heads, columns)
        with pytest.raises(AssertionError, match="a table"):
            group_triton.summarize_group_with_triton([*heads[:1], torch.ones(5)], EIGHT.columns)


def test_an_update_takes_the_copy_before_the_step_and_nothing_else() -> None:
    check_in_the_interpreter("tests.test_pair_kernels", "check_update")


def check_update() -> None:
    """Counted on the mocked device, the kernels of a GPU interpreted, against a CPU."""
    from tmm.kernels.summarize import group_triton

    update = tmm.update("relative_norm", "rms", "kurtosis")
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.MonkeyPatch.context() as patch:
            launched = Interpreted(group_triton._reduce_chunks)
            patch.setattr(group_triton, "_reduce_chunks", launched)
            patch.setattr(group_triton, "merge_chunks", Interpreted(group_triton.merge_chunks))
            with mocked_device(patch, ("torch", "Triton")) as device:
                found = {}
                for where in ("cpu", "cuda:0"):
                    model = to_device(Many(dtype), where)
                    size = sum(p.numel() * p.element_size() for p in model.parameters())
                    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
                    tmm.instrument(model, tmm.Spec(update))
                    monitor = tmm.monitor(model)
                    monitor.watch(optimizer)
                    for parameter in model.parameters():
                        parameter.grad = torch.ones_like(parameter)
                    with monitor.step(0):
                        before = device.peak = device.allocated
                        optimizer.step()
                    if where != "cpu":
                        rows = 8 * (3 * 17 + 5) * len(list(model.parameters()))  # of chunks, joined
                        assert size <= device.peak - before <= size + rows
                        assert launched.launches == 1
                        assert not device.waits
                    found[where] = monitor.get_all_metrics()[0]
                    tmm.remove(model)
        assert found["cpu"].keys() == found["cuda:0"].keys()
        for key, value in found["cpu"].items():
            np.testing.assert_allclose(found["cuda:0"][key], value, rtol=1e-5, err_msg=key)


class Launches(TorchDispatchMode):
    """Counts operations that a device would run, and stands for kernels of Triton."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function).split(".")[1]
        self.count += name not in ("detach", "empty", "new_empty", "select", "view", "as_strided")
        return function(*args, **(kwargs or {}))

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*_: object, **__: object) -> None:
            self.count += 1

        return launch


@pytest.mark.parametrize("columns", [FEW, ("sum_squares",), EIGHT.columns, EVERY])
def test_a_comparison_takes_three_launches(
    columns: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that reads both tensors, one that joins rows, and one that takes columns from them."""
    pytest.importorskip("triton")
    from tmm.kernels.summarize import group_triton

    launches = Launches()
    for name in ("_reduce_stacked", "_reduce_chunks", "merge_chunks"):
        monkeypatch.setattr(group_triton, name, launches)
    x = torch.randn(70_000)
    with launches:
        group_triton.summarize_pairs_with_triton([(x, x + 1)], columns)
    assert launches.count == 1 + (2 if columns == EVERY else 3)  # x + 1 itself


def test_a_difference_in_a_graph_is_not_written_down() -> None:
    """As ``tmm::summarize_difference`` is called there."""
    for own, other in (*alike()[-8:], *apart(), *of_several_dtypes()):
        columns = FEW if own.is_complex() else EVERY
        row = summarize_difference(own, other, ",".join(columns))
        check_pairs(lambda pairs, columns, row=row: row[None], [(own, other)], columns)
    x = torch.randn(1 << 20)
    (reduction,) = tmm.core.metrics.builtin_reductions(("rms",), is_complex=False)
    peak = peak_memory(lambda: reduce_pair(x, x + 1, reduction))
    assert peak < 1.2 * x.nbytes  # x + 1 itself
