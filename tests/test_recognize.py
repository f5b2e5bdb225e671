"""Users' functions that are metrics of tmm: recognized, and the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tmm
from tests.ways import Counting
from tmm.core.merging import merge
from tmm.core.metrics import COLUMN_SEPARATOR, KnownMetric, finalize, function_reduction
from tmm.kernels.ops import summarize
from tmm.passes.metrics.recognize import recognize
from tmm.passes.metrics.recognize_eager import KnownFunctions, is_stateless
from tmm.passes.metrics.trace import trace_function

Function = Callable[[torch.Tensor], torch.Tensor]

KNOWN: dict[str, tuple[Function, str, int]] = {
    "mean": (lambda x: x.mean(), "mean", 0),
    "in float32": (lambda x: x.float().mean(), "mean", 0),
    "sum over count": (lambda x: x.sum() / x.numel(), "mean", 0),
    "of rows": (lambda x: x.mean(dim=-1), "mean", 4),
    "of planes": (lambda x: x.mean((0, -1)), "mean", 8),
    "detached": (lambda x: x.detach().mean().float(), "mean", 0),
    "std": (lambda x: x.std(), "std", 0),
    "variance": (lambda x: x.var(), "variance", 0),
    "norm": (lambda x: x.norm(), "norm", 0),
    "norm 2": (lambda x: x.norm(2), "norm", 0),
    "vector norm": (torch.linalg.vector_norm, "norm", 0),
    "linalg norm": (lambda x: torch.linalg.norm(x.flatten()), "norm", 0),
    "rms": (lambda x: x.square().mean().sqrt(), "rms", 0),
    "rms of powers": (lambda x: torch.sqrt(torch.mean(x**2)), "rms", 0),
    "rms of products": (lambda x: (x * x).mean().sqrt(), "rms", 0),
    "rms of norm": (lambda x: x.norm() / x.numel() ** 0.5, "rms", 0),
    "mean square": (lambda x: x.pow(2).mean(), "mean_square", 0),
    "squares of rows": (lambda x: x.pow(2).mean(-1), "mean_square", 4),
    "absmax": (lambda x: x.abs().max(), "absmax", 0),
    "abs amax": (lambda x: x.abs().amax(), "absmax", 0),
    "mean abs": (lambda x: x.abs().mean(), "mean_abs", 0),
    "max": (lambda x: x.max(), "max", 0),
    "min": (lambda x: x.reshape(-1).amin(), "min", 0),
    "sum": (lambda x: x.sum(), "sum", 0),
    "zeros": (lambda x: (x == 0).float().mean(), "zero_fraction", 0),
    "count of zeros": (lambda x: (x == 0).sum() / x.numel(), "zero_fraction", 0),
}
UNKNOWN: dict[str, Function] = {
    "biased": lambda x: x.std(unbiased=False),
    "1-norm": lambda x: x.norm(1),
    "largest": lambda x: x.norm(math.inf),
    "norm of rows": lambda x: x.norm(dim=-1),
    "scaled": lambda x: 2 * x.mean(),
    "half of the sum": lambda x: x.sum() / 2,
    "part": lambda x: x[0].mean(),
    "transposed": lambda x: x.mT.mean(-1).max(),
    "other zeros": lambda x: (x == 1).float().mean(),
    "itself": lambda x: x,
    "rows then columns": lambda x: x.view(-1, 2).mean(-1),
    "to half": lambda x: x.half().mean(),
    "two": lambda x: x.mean() + x.std(),
    "centered": lambda x: (x - x.mean()).square().mean(),
    "root of rows": lambda x: x.square().mean(-1).sqrt(),
    "max of rows": lambda x: x.amax(-1),
}


def known(function: Function, dtype: torch.dtype = torch.float32) -> KnownMetric | None:
    with FakeTensorMode():
        example = torch.empty(2, 3, 4, dtype=dtype)
    return recognize(trace_function(example, function_reduction("f", function, "mean")).graph)


@pytest.mark.parametrize("name", KNOWN)
def test_known(name: str) -> None:
    function, metric, row_length = KNOWN[name]
    assert known(function) == KnownMetric(metric, row_length)


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown(name: str) -> None:
    assert known(UNKNOWN[name]) is None


def test_single_numbers() -> None:
    model = nn.Flatten(0)
    tmm.instrument(model, tmm.Spec(tmm.activation(rows=lambda x: x.mean(-1), all=torch.mean)))
    monitor = tmm.monitor(model)
    with FakeTensorMode():
        example = torch.empty(())
    for function in (lambda x: x.mean(-1), lambda x: x.mean(-1).sqrt()):
        assert (
            recognize(trace_function(example, function_reduction("f", function, "mean")).graph)
            is None
        )
    with monitor.step(0):
        model(torch.tensor([[3.0]]))
    assert set(monitor.get_step_metrics().values()) == {3.0}


def test_numbers_that_are_not_real_are_unknown() -> None:
    assert known(lambda x: x.abs().sum(), torch.complex64) is None
    assert known(lambda x: x.sum(), torch.int64) is None
    assert known(lambda x: x.mean(), torch.bfloat16) == KnownMetric("mean")


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(KNOWN)),
    st.sampled_from(["mean", "sum", "min", "max"]),
    st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["", "zero", "nan", "inf"])), max_size=4),
)
def test_rows_are_those_of_the_function(
    name: str, aggregate: str, calls: list[tuple[int, str]]
) -> None:
    """Joined over calls like the function's own values, in float64, NaN and infinities included."""
    function, metric, row_length = KNOWN[name]
    reduction = function_reduction("f", function, aggregate)  # type: ignore[arg-type]
    found = KnownMetric(metric, row_length)
    if not found.can_serve(reduction) or not calls:
        return
    rows, values = [], []
    for seed, special in calls:
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
        if special:
            x[0, 1, 2] = {"zero": 0.0, "nan": math.nan, "inf": math.inf}[special]
        row = summarize(x, COLUMN_SEPARATOR.join(found.columns))
        rows.append(found.rows(reduction, row[None].numpy()))
        values.append(function(x).double().reshape(-1))
    joined = torch.cat(values)
    expected = getattr(joined, aggregate)().item()
    merged = rows[0]
    for row in rows[1:]:
        merged = merge(reduction, [merged, row])
    (value,) = finalize(reduction, merged)[0]
    assert value == pytest.approx(expected, rel=1e-6, abs=1e-12, nan_ok=True)


def test_one_kernel_serves_functions_and_built_in_metrics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    functions = {f"f{i}": function for i, (function, *_) in enumerate(KNOWN.values())}
    backend = Counting("eager")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    spec = tmm.Spec(
        tmm.activation("rms", "kurtosis", "histogram"),
        tmm.activation(**functions),
        tmm.activation(own=lambda x: x.exp().mean(), least=torch.median),
        tmm.activation(listed=lambda x: x.mean(), aggregate=lambda values: values.numel()),
    )
    tmm.instrument(compiled, spec)
    monitor = tmm.monitor(compiled)
    batches = [torch.randn(2, 3, 4), torch.randn(5, 3, 4)]
    with monitor.step(0):
        for batch in batches:
            compiled(batch)
    found = monitor.get_step_metrics()
    (graph, *_) = tmm.explain(compiled).graphs
    reads = [
        line for line in graph.after if "summarize" in str(line) and "sum_squares" in str(line)
    ]
    assert len(reads) == 2, reads  # one for each module; the root shares that of the last
    with torch.no_grad():
        for site, part in (("0", model[0]), ("1", model), ("[root module]", model)):
            outputs = [part(batch).double() for batch in batches]
            for name, function in functions.items():
                values = torch.cat([function(output).double().reshape(-1) for output in outputs])
                key = f"activation/{site}/{name}"
                assert found[key] == pytest.approx(values.mean().item(), rel=2e-6), key
            exponents = np.mean([output.exp().mean().item() for output in outputs])
            assert found[f"activation/{site}/own"] == pytest.approx(exponents, rel=1e-5)
            assert found[f"activation/{site}/listed"] == 2
            whole = torch.cat([output.reshape(-1) for output in outputs])
            rms = whole.square().mean().sqrt().item()
            assert found[f"activation/{site}/rms"] == pytest.approx(rms, rel=1e-5)


def test_sizes_stay_open() -> None:
    model = nn.Linear(4, 4)
    backend = Counting("eager")
    compiled = torch.compile(model, backend=backend, dynamic=True)
    rules = tmm.activation(
        a=lambda x: x.mean(), b=lambda x: x.sum() / x.numel(), c=lambda x: x.mean(-1)
    )
    tmm.instrument(compiled, tmm.Spec(rules))
    monitor = tmm.monitor(compiled)
    for step, size in enumerate((3, 5, 7)):
        with monitor.step(step):
            output = compiled(torch.randn(size, 4))
        for value in monitor.get_step_metrics().values():
            assert value == pytest.approx(output.mean().item(), rel=1e-4)
    assert len(tmm.explain(compiled).graphs) == 1


scale = 3.0


def test_functions_of_parameters() -> None:
    """Those that read something else run each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    calls: list[tuple[int, ...]] = []

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return x.mean()

    functions: dict[str, Function] = {
        "norm": lambda p: p.norm(),
        "number": lambda p: p.norm().item(),  # type: ignore[dict-item,return-value]
        "scaled": lambda p: p.norm() * scale,
        "counted": counted,
        "largest": lambda p: torch.max(p),
    }
    stateless = [name for name, function in functions.items() if is_stateless(function)]
    assert stateless == ["norm", "number", "largest"]
    assert not is_stateless(torch.linalg.vector_norm)
    finder = KnownFunctions()
    for name, function in functions.items():
        metric = finder.find(function_reduction(name, function, "mean"), model[0].weight)
        expected = {"norm": KnownMetric("norm"), "largest": KnownMetric("max")}.get(name)
        assert metric == expected
    calls.clear()
    tmm.instrument(model, tmm.Spec(tmm.parameter(**functions), tmm.gradient(**functions), every=2))
    monitor = tmm.monitor(model)
    for step in range(3):
        with monitor.step(step):
            model(torch.randn(2, 4)).sum().backward()
            monitor.monitor_parameters()
            monitor.monitor_gradients()
        if step == 1:
            continue
        found = monitor.get_step_metrics()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            for family, tensor in (("parameter", parameter), ("gradient", parameter.grad)):
                for metric_name, function in functions.items():
                    expected = float(function(tensor.detach()))
                    key = f"{family}/{name}/{metric_name}"
                    assert found[key] == pytest.approx(expected, rel=1e-6, abs=1e-7), key
