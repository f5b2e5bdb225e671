"""What GPUs are given to do: the text that Inductor generates for mocked ones."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import tmm
from benchmarks import mocked_gpu
from benchmarks.mocked_gpu import Plan, blocking_calls, mock_gpus, plan_of
from tests.triton_interpreter import printed_by
from tmm.core.metrics import HISTOGRAM_EDGES, builtin_reductions
from tmm.core.torch_private import FakeTensorMode
from tmm.instrumentation import backend, kernels_ahead
from tmm.kernels.attention.attention_call import AttentionCall
from tmm.kernels.fused.merge_operator import merge_parts
from tmm.kernels.fused.row_partials import FusedRow
from tmm.kernels.ops import _histogram, inner_edges, summarize, summarize_difference, summarize_into
from tmm.kernels.summarize import inductor_rows
from tmm.kernels.summarize.inductor_rows import _kernel
from tmm.kernels.summarize.torch_rows import summarize_with_torch
from tmm.passes.graph.values import set_value
from tmm.passes.metrics.gradient_probe import Part, probe, spread_rows

(FIVE,) = builtin_reductions(("mean", "std", "rms", "absmax", "zero_fraction"), is_complex=False)
KERNELS = {
    "five": (FIVE.columns, torch.bfloat16, 1, True),
    "extremes": (("absmax", "minimum", "maximum"), torch.float32, 0, True),
    "one row": (("sum_squares", "absmax"), torch.float16, 1, False),
}
"""Columns, dtype, index of the device, and whether there are several rows."""


def print_plans() -> None:
    """In a process that takes itself for one with two GPUs, the first of which is current."""
    mock_gpus()
    plans = {}
    for name, (columns, dtype, index, several_rows) in KERNELS.items():
        kernel = columns, dtype, torch.device("cuda", index), several_rows
        plans[name] = vars(plan_of(lambda kernel=kernel: _kernel(*kernel)))
    print(json.dumps(plans))


@pytest.fixture(scope="module")
def plans() -> dict[str, Plan]:
    of_users = {"TORCHINDUCTOR_CUDAGRAPHS": "1", "TORCHINDUCTOR_CPP_WRAPPER": "1"}
    found = json.loads(
        printed_by("tests.test_gpu_plans", "print_plans", mocked_gpu.ENVIRONMENT | of_users)
    )
    return {name: Plan(**plan) for name, plan in found.items()}


def test_a_site_is_read_once(plans: dict[str, Plan]) -> None:
    assert plans["five"].readings == 1
    assert (plans["five"].triton_launches, plans["five"].other_launches) == (7, 0)
    assert (plans["one row"].triton_launches, plans["one row"].readings) == (1, 1)


def test_sizes_are_not_counted_in_32_bits(plans: dict[str, Plan]) -> None:
    for name in ("five", "extremes"):
        assert not plans[name].counts_in_32_bits
        assert "'ks0': 'i64'" in plans[name].text  # what the number of a row is multiplied with


def test_each_device_has_a_kernel_of_its_own(plans: dict[str, Plan]) -> None:
    assert {name: plan.device_indices for name, plan in plans.items()} == {
        name: {index} for name, (_, _, index, _) in KERNELS.items()
    }


def test_settings_of_programs_do_not_reach_the_kernel(plans: dict[str, Plan]) -> None:
    for plan in plans.values():
        assert not plan.has_cuda_graphs
        assert not plan.is_cpp


def test_a_histogram_waits_for_nothing() -> None:
    def call() -> None:
        assert _histogram(torch.empty(8, 100, device="cuda")).device.type == "cuda"

    assert blocking_calls(call) == []


def test_edges_are_the_same_without_a_copy() -> None:
    for dtype in (torch.float64, torch.float32):
        made = inner_edges(dtype, torch.device("meta"))  # as on any device but a CPU
        assert (made.dtype, len(made)) == (dtype, len(HISTOGRAM_EDGES) - 2)
        with _on_the_cpu():
            made = inner_edges(dtype, torch.device("meta"))
        assert torch.equal(made, torch.from_numpy(HISTOGRAM_EDGES[1:-1].copy()).to(dtype))


class _on_the_cpu(TorchFunctionMode):  # noqa: N801
    """Makes on a CPU what is to be made elsewhere."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


@pytest.mark.parametrize("columns", [FIVE.columns, ("maximum", "minimum", "count")])
def test_rows_of_empty_tensors_wait_for_nothing(columns: tuple[str, ...]) -> None:
    def call() -> None:
        assert summarize_with_torch(torch.empty(0, 3, device="cuda"), columns).is_cuda
        query = torch.empty(1, 2, 0, 8, device="cuda")
        assert AttentionCall(query, query, None, 1, True, 1.0).empty_rows().is_cuda

    assert blocking_calls(call) == []


def test_what_waits_is_found() -> None:
    def call() -> None:
        x, of_cpu = torch.ones(3, device="cuda"), torch.ones(3)
        for pair in ((x, of_cpu), (of_cpu, x), (x, of_cpu, True), (x, x)):
            torch.ops.aten.copy_.default(*pair)

    assert blocking_calls(call) == ["copy_", "copy_"]


def test_kernels_are_compiled_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(kernels_ahead, "compile_ahead", lambda *given: asked.append(given))
    monkeypatch.setattr(
        *(kernels_ahead, "compile_pairs"),
        lambda own, other, columns: asked.append((own.dtype, other.dtype, columns, own.device)),
    )
    graph = torch.fx.Graph()
    nodes = {}
    with FakeTensorMode():
        for name, dtype in {"half": torch.bfloat16, "complex": torch.complex64}.items():
            nodes[name] = graph.placeholder(name)
            set_value(nodes[name], torch.empty(30, 100, dtype=dtype, device="cuda:1"))
    row = graph.placeholder("row")
    graph.call_function(summarize, (nodes["half"], "count,sum"))
    graph.call_function(summarize_into, (row, 0, nodes["complex"], "absmax"))
    graph.call_function(summarize_difference, (nodes["half"], nodes["half"], "sum_squares,dot"))
    graph.call_function(summarize_difference, (nodes["complex"], nodes["complex"], "sum_squares"))
    graph.call_function(probe, (nodes["half"], (row, row), ("sum", ""), (None, None), False, row))
    graph.output(())
    kernels_ahead.compile_kernels(torch.fx.GraphModule({}, graph))
    device = torch.device("cuda", 1)
    assert asked == [
        (3000, ("count", "sum"), torch.bfloat16, device),
        (3000, ("absmax",), torch.float32, device),
        (torch.bfloat16, torch.bfloat16, ("sum_squares", "dot"), device),
        (3000, ("sum_squares",), torch.float32, device),
        (3000, ("sum",), torch.float32, device),
    ]


def test_kernels_are_compiled_before_the_graph_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each graph that is measured, and not when it runs first."""
    order: list[str] = []
    monkeypatch.setattr(backend, "compile_kernels", lambda module: order.append("kernels"))

    def compile_graph(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        order.append("graph")
        return module.forward

    compiled = torch.compile(torch.nn.Linear(3, 3), backend=compile_graph)
    tmm.instrument(compiled, tmm.Spec(tmm.activation("rms")))
    with tmm.monitor(compiled).step(0):
        compiled(torch.randn(2, 3))
    tmm.remove(compiled)
    assert order == ["kernels", "graph"]


def print_pairs_ahead() -> None:
    """What is compiled ahead for sm_90, and again for a call with tensors that are aligned."""
    mock_gpus()
    from tmm.kernels.summarize import group_ahead, group_triton

    given = []
    for columns, own, other in (
        (("count", "sum_squares", "dot"), torch.bfloat16, torch.float32),
        (("count", "mean", "moment2"), torch.float32, torch.float32),
    ):
        device = torch.device("cuda", 0)
        group_ahead.compile_pairs_ahead(own, other, columns, 70_000, device)
        given.append((own, other, columns))
    kernel = group_triton._reduce_stacked
    compiled = len(kernel.device_caches[0][0])
    for own, other, columns in given:
        for elements in (1, 16, 70_000, 1 << 32):
            tensors = (torch.empty(elements % 100_000, dtype=dtype) for dtype in (own, other))
            kernel.run(
                *(*tensors, elements, -(-elements // (1 << 15))),
                torch.empty(3, 17, dtype=torch.float64),
                WIDE=group_triton._wide(own, other),
                ALIGNMENT=16,
                grid=(1,),
                warmup=True,
                **group_triton._constants(columns, is_pair=True),
            )
    print(json.dumps([compiled, len(kernel.device_caches[0][0])]))


def print_group_ahead() -> None:
    """The same of tensors that are given in a list."""
    mock_gpus()
    from tmm.kernels.summarize import group_ahead, group_triton

    columns, dtype = ("count", "mean", "moment2"), torch.bfloat16
    group_ahead.compile_group_ahead([dtype], columns, torch.device("cuda", 0))
    kernel = group_triton._reduce_chunks
    compiled = len(kernel.device_caches[0][0])
    table = torch.zeros(12, dtype=torch.int64)
    kernel.run(
        *(table, table, table, table, table, 5, torch.empty(3, 14, dtype=torch.float64)),
        DTYPE=group_triton._of_triton(dtype),
        OTHER=group_triton._of_triton(dtype),
        WIDE=group_triton._wide(dtype, dtype),
        ALIGNMENT=16,
        grid=(1,),
        warmup=True,
        **group_triton._constants(columns, is_pair=False),
    )
    print(json.dumps([compiled, len(kernel.device_caches[0][0])]))


def test_the_kernel_of_groups_is_compiled_ahead() -> None:
    found = json.loads(
        printed_by("tests.test_gpu_plans", "print_group_ahead", mocked_gpu.ENVIRONMENT)
    )
    assert found == [1, 1]


def test_the_kernel_of_pairs_is_compiled_ahead() -> None:
    found = json.loads(
        printed_by("tests.test_gpu_plans", "print_pairs_ahead", mocked_gpu.ENVIRONMENT)
    )
    # Of 2**31 elements and more another one is needed, whose sizes have 64 bits.
    assert found == [2, 4]


def test_a_kernel_is_compiled_apart_from_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever modes and contexts there are: those of a fake tensor would end it."""
    seen: list[bool] = []

    def compile_kernel(*_: object) -> Any:
        context = torch._guards.TracingContext.try_get()
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        modes = [context, fake, *torch.utils._python_dispatch._get_current_dispatch_mode_stack()]
        kinds = torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled()
        seen.append(all(mode is None for mode in modes) and not any(kinds))
        return lambda x: x

    monkeypatch.setattr(inductor_rows, "_compile", compile_kernel)
    given = ("sum",), torch.float32, torch.device("cpu"), True

    def compile_graph(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        _kernel(*given)
        return module.forward

    contexts = FakeTensorMode(), torch.inference_mode(), FlopCounterMode(display=False)
    for context in (*contexts, torch.autocast("cpu", dtype=torch.bfloat16)):
        _kernel.cache_clear()
        with context:
            _kernel(*given)
    _kernel.cache_clear()
    torch.compile(torch.sin, backend=compile_graph)(torch.randn(3))
    _kernel.cache_clear()
    assert seen == [True] * 5


def test_merging_is_prepared_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(kernels_ahead, "prepare_merge", lambda *given: asked.append(given))
    row = FusedRow(FIVE.columns, 100, is_wide=False)
    device, graph = torch.device("cuda", 1), torch.fx.Graph()
    partials, rows = graph.placeholder("partials"), graph.placeholder("rows")
    with FakeTensorMode():
        set_value(partials, torch.empty(len(row.partials), 30, device=device))
        set_value(rows, torch.empty(9, device=device))
    graph.call_function(merge_parts, ([partials, partials], [*row.layout, *row.layout]))
    parts = [Part(7, [len(row.partials), 40], torch.float32, row.layout)]
    graph.call_function(spread_rows, (rows, parts, ""))
    graph.call_function(spread_rows, (rows, [Part(2, [8, 8], torch.float32)], "count,sum"))
    graph.output(())
    kernels_ahead.compile_kernels(torch.fx.GraphModule({}, graph))
    assert asked == [
        ([30, 30], [*row.layout, *row.layout], device),
        ([40], row.layout, device),
    ]


@pytest.mark.slow
def test_a_kernel_is_compiled_while_a_graph_is() -> None:
    """For a CPU, as there is no GPU, and under autocast."""
    kernels, x = [], torch.randn(8, 2560)

    def backend(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        kernels.append(_kernel(("sum", "absmax"), torch.float32, torch.device("cpu"), True))
        return module.forward

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.compile(torch.sin, backend=backend)(x), x.sin())
    (kernel,) = kernels
    assert kernel is not None
    for rows in (x, x[:3]):
        expected = summarize_with_torch(rows.double(), ("sum", "absmax"))
        torch.testing.assert_close(kernel(rows), expected, rtol=1e-5, atol=1e-3)
