"""What Inductor makes of fused statistics on a GPU: the text that it generates for a mocked one."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from benchmarks import mocked_gpu
from benchmarks.mocked_gpu import Plan, mock_gpus, plan_of
from tests.triton_interpreter import printed_by
from tmm.core.inductor_private import compile_fx
from tmm.core.torch_private import FakeTensorMode
from tmm.kernels.fused.choose_lowering import fused_row
from tmm.kernels.fused.merge_operator import merge_parts, register_lowerings
from tmm.kernels.fused.row_partials import partials_of

FIVE = ("count", "sum", "sum_squares", "mean", "moment2", "absmax", "zeros")
COUNTS = ("count", "absmax", "zeros", "nans", "infinities")
Measure = Callable[[torch.Tensor], torch.Tensor]


def scaled(x: torch.Tensor, measure: Measure) -> torch.Tensor:
    """A product that nobody stores, as a half would round it."""
    return measure(x * 30000.0).sigmoid()


def gelu(x: torch.Tensor, measure: Measure) -> torch.Tensor:
    return measure(functional.gelu(x))


def residual_and_norm(x: torch.Tensor, measure: Measure) -> torch.Tensor:
    y = measure(x + x.cos())
    return measure(functional.layer_norm(y, y.shape[-1:]))


def twice(x: torch.Tensor, measure: Measure) -> torch.Tensor:
    return measure(x.cos() * 2.0)


def images(x: torch.Tensor, measure: Measure) -> torch.Tensor:
    return measure(x.view(8, 16, 16, 32).relu())


def hidden(x: torch.Tensor, measure: Measure) -> torch.Tensor:
    """The inside of a multilayer perceptron, whose rows no kernel of it sums."""
    return measure(functional.gelu(measure(x.repeat(64, 2)), approximate="tanh"))


def summed(x: torch.Tensor, measure: Measure) -> torch.Tensor:
    """What is added to each item of a batch has a gradient that is a sum over them."""
    return measure(measure(x.view(16, 4, 1024).cos()).sum(0))


PROGRAMS: dict[str, tuple[Callable[..., torch.Tensor], torch.dtype, tuple[str, ...]]] = {
    "scaled": (scaled, torch.float16, COUNTS),
    "gelu": (gelu, torch.bfloat16, FIVE),
    "residual_and_norm": (residual_and_norm, torch.bfloat16, FIVE),
    "twice": (twice, torch.bfloat16, FIVE),
    "images": (images, torch.float32, FIVE),
    "hidden": (hidden, torch.bfloat16, FIVE),
    "summed": (summed, torch.bfloat16, FIVE),
}


def print_plans() -> None:
    """In a process that takes itself for one with a GPU: each program plain, and measured."""
    mock_gpus(1)
    register_lowerings()
    print(json.dumps({name: [vars(_plan(name, m)) for m in (False, True)] for name in PROGRAMS}))


def _plan(name: str, is_measured: bool) -> Plan:
    program, dtype, columns = PROGRAMS[name]

    def body(x: torch.Tensor) -> Any:
        partials, layout = [], []

        def measure(y: torch.Tensor) -> torch.Tensor:
            if is_measured:
                found = fused_row(y, columns, y.numel(), "auto", is_free=name == "hidden")
                assert not isinstance(found, str), found
                rows, row = found
                times = 2 if name == "twice" else 1  # as two modules give one tensor
                partials.extend([partials_of(y, *row.arguments(rows))] * times)
                layout.extend(row.layout * times)
            return y

        result = program(x, measure)
        return (result, merge_parts(partials, layout)) if is_measured else (result,)

    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(64, 1024, dtype=dtype, device="cuda")
        graph = make_fx(body)(x)
        (placeholder,) = graph.graph.find_nodes(op="placeholder")
        example = placeholder.meta["val"]
        return plan_of(lambda: compile_fx()(graph, [example]))


@pytest.fixture(scope="module")
def plans() -> dict[str, tuple[Plan, Plan]]:
    found = json.loads(printed_by("tests.test_fused_plans", "print_plans", mocked_gpu.ENVIRONMENT))
    return {name: (Plan(**plain), Plan(**own)) for name, (plain, own) in found.items()}


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name != "summed"])
def test_partials_ride_in_the_kernels_that_are_there(
    name: str, plans: dict[str, tuple[Plan, Plan]]
) -> None:
    plain, measured = plans[name]
    places = name == "twice"  # where the partials lie, of which some are given twice
    assert measured.triton_launches == plain.triton_launches + places
    assert measured.other_launches == plain.other_launches + 1  # merge_joined
    assert "torch.ops.tmm.merge_joined" in measured.text
    assert measured.readings == plain.readings


def test_rows_that_nothing_needs_are_joined(plans: dict[str, tuple[Plan, Plan]]) -> None:
    _, measured = plans["hidden"]
    sizes = re.findall(r"empty_strided_cuda\(\((\d+), \), \(1, \), torch.float32", measured.text)
    partials, rows = 5, 64 * 64 // 4
    assert sizes == [str(2 * partials * rows)]


def test_kernels_that_sum_over_a_batch_stay_whole(plans: dict[str, tuple[Plan, Plan]]) -> None:
    plain, measured = plans["summed"]
    assert measured.triton_launches == plain.triton_launches + 2  # what reads both, row by row
    for plan in (plain, measured):
        (kernel,) = (text for text in plan.text.split("async_compile.triton(") if "cos(" in text)
        assert re.search(r"r0_numel = 16\b", kernel)


def test_half_precision_is_rounded_where_nobody_stores_it(
    plans: dict[str, tuple[Plan, Plan]],
) -> None:
    plain, measured = plans["scaled"]
    rounding = re.compile(r"\.to\(tl\.float16\)")
    assert not rounding.search(plain.text)
    assert rounding.search(measured.text)
