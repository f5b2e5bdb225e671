"""Programs of unusual shape that make a NaN or an infinity."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmm
from tests.nonfinite_models import (
    CASES,
    Gate,
    Length,
    LogOfZero,
    assert_line,
    assert_names,
)

# Unusual programs


class Broken(nn.Module):
    """A graph break in the middle, and a choice that depends on data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)
        torch._dynamo.graph_break()
        y = outside(y)
        if y.sum() > 1e9:
            return self.second(y).sum()
        return self.second(y * 0).log().sum()  # <after a break>


@torch.compiler.disable
def outside(x: torch.Tensor) -> torch.Tensor:
    return (x.detach() * 0).abs().rsqrt().clamp(max=5)  # <outside of graphs>


@pytest.mark.parametrize("compiled", [False, True])
def test_graph_breaks_and_code_outside_of_graphs(compiled: bool) -> None:
    module = Broken()
    with torch.no_grad():
        module.second.bias.zero_()
    model = torch.compile(module, backend="aot_eager") if compiled else module
    result = tmm.find_nonfinite(model, torch.randn(3, 8))
    assert result is not None
    assert (result.graphs >= 4) is compiled
    assert_names(result.first, "after a break", "aten.log", "[root module]")
    assert result.first.reaches
    (hidden,) = (o for o in result.others if o.operation == "aten.rsqrt")
    assert_names(hidden, "outside of graphs", "aten.rsqrt", "[root module]")


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x - x).log()  # <own backward>


class CubeForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x / (x - x)  # <own forward>

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class WithFunction(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(self.blocks[0](x)).sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_custom_autograd_functions(compiled: bool) -> None:
    for function, marker, operation in (
        (Cube, "own backward", "aten.log"),
        (CubeForward, "own forward", "aten.div"),
    ):
        module = WithFunction(function)
        model = torch.compile(module, backend="aot_eager") if compiled else module
        result = tmm.find_nonfinite(model, torch.randn(3, 8))
        assert result is not None
        origin = result.first
        phase = "backward" if function is Cube else "forward"
        assert (origin.operation, origin.phase) == (operation, phase)
        assert origin.module == "[root module]"
        if not compiled or function is CubeForward:
            assert_names(origin, marker, operation, "[root module]", phase)
        assert "gradient of blocks.0.weight" in origin.reaches or function is CubeForward


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        y = self.linear(x)
        part = y[:, 2:4]
        part.mul_(0)
        part.log_()  # <in place>
        return y.sum()


@pytest.mark.parametrize("compiled", [False, True])
def test_operations_in_place_and_on_views(compiled: bool) -> None:
    module, x = InPlace(), torch.randn(3, 8)
    model = torch.compile(module, backend="aot_eager") if compiled else module
    before, version = x.clone(), x._version
    result = tmm.find_nonfinite(model, x)
    assert result is not None
    assert_line(result.first, "in place")
    assert result.first.operation == ("aten.log" if compiled else "aten.log_")
    assert result.first.inputs[0].zeros == 6
    assert "6 of 6 elements are 0" in result.first.reason
    assert "loss" in result.first.reaches
    assert torch.equal(x, before)
    assert x._version == version


class BackwardOnView(nn.Module):
    """The derivative of a root, taken in place on a view."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        y = y - y.detach()
        y[:, 2:4].sqrt_()  # <root of a view>
        return y.sum()


def test_the_backward_of_an_operation_on_a_view() -> None:
    result = tmm.find_nonfinite(BackwardOnView(), torch.randn(3, 8))
    assert result is not None
    assert_names(result.first, "root of a view", "aten.div", "[root module]", "backward")


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.length = Length()
        self.gate = Gate()
        self.reentrant = reentrant

    def inner(self, x: torch.Tensor) -> torch.Tensor:
        y = self.blocks[0](x)
        y = self.gate(nn.functional.dropout(y, 0.5))
        return self.length(y - y.detach())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant).sum()


@pytest.mark.parametrize(("reentrant", "compiled"), [(False, False), (False, True), (True, False)])
def test_activation_checkpointing(reentrant: bool, compiled: bool) -> None:
    module, x = Checkpointed(reentrant), torch.randn(3, 8, requires_grad=True)
    model = torch.compile(module, backend="aot_eager") if compiled else module
    result = tmm.find_nonfinite(model, x)
    assert result is not None
    assert_names(result.first, "root at zero", "aten.div", "length", "backward")
    assert "gradient of blocks.0.weight" in result.first.reaches
    (other,) = result.others  # once, though it is computed twice
    assert_names(other, "hidden infinity", "aten.exp", "gate")
    assert x.grad is None
    assert all(p.grad is None for p in module.parameters())


class Assorted(nn.Module):
    """Integers, complex numbers, a dictionary; one module called twice, and nested functions."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.twice = nn.Linear(8, 8)
        self.scale = Scale()

    def forward(self, ids: torch.Tensor) -> dict[str, Any]:
        x = self.embed(ids)
        spectrum = torch.fft.fft(self.twice(x))
        classes = x.argmax(-1)

        def inner(y: torch.Tensor) -> torch.Tensor:
            def innermost(z: torch.Tensor) -> torch.Tensor:
                return self.scale(self.scale(z.abs()))

            return innermost(y)

        y = self.twice(inner(spectrum))
        return {"loss": y.mean(), "parts": [classes, {"spectrum": spectrum}], "none": None}


class Scale(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 1e25  # <called twice>


@pytest.mark.parametrize("compiled", [False, True])
def test_integers_complex_numbers_dictionaries_and_shared_modules(compiled: bool) -> None:
    module = Assorted()
    model = torch.compile(module, backend="aot_eager") if compiled else module
    result = tmm.find_nonfinite(model, {"ids": torch.arange(6).reshape(2, 3)})
    assert result is not None
    assert_names(result.first, "called twice", "aten.mul", "scale")
    assert [line.function for line in result.first.stack] == [
        *("forward", "inner", "innermost", "forward"),
    ]
    assert result.checked == "forward and backward"
    assert "loss" in result.first.reaches


def test_complex_results() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return torch.view_as_real(torch.fft.fft(x) / 0).abs().clamp(max=1).sum()  # <complex>

    result = tmm.find_nonfinite(step, torch.randn(3, 8))
    assert result is not None
    assert_names(result.first, "complex", "aten.div", "")
    assert result.first.inputs[0].dtype == "complex64"


class Raises(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.length = LogOfZero()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        loss = self.length(x)
        if not torch.isfinite(loss):
            raise FloatingPointError("the loss is not finite")
        return loss


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_that_refuses_a_nan_is_explained(compiled: bool) -> None:
    module, x = Raises(), CASES["log of zero"].build()[1]
    model = torch.compile(module, backend="aot_eager") if compiled else module
    result = tmm.find_nonfinite(model, x)
    assert result is not None
    assert_names(result.first, "log of zero", "aten.log", "length")
    assert "the step ended with FloatingPointError: the loss is not finite" in str(result)


class Half(nn.Module):
    """Overflows float16 in between, which a compiler that fuses does not write down."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ((x * x) / 1e3).sum()  # <half>


def test_a_compiled_program_that_rounds_differently_is_told_apart() -> None:
    model, x = torch.compile(Half()), torch.full((64,), 300.0).half()
    assert model(x).isfinite()
    result = tmm.find_nonfinite(model, x)
    assert result is not None
    assert_names(result.first, "half", "aten.mul", "[root module]")
    assert result.own_program is False
    assert "the compiled program itself: finite" in str(result)


def test_a_nan_that_only_the_compiled_program_has() -> None:
    def broken(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return lambda *arguments: [output * math.nan for output in graph(*arguments)]

    model, x = torch.compile(nn.Linear(4, 4), backend=broken), torch.randn(3, 4)
    model(x)
    result = tmm.find_nonfinite(model, x, torch.sum)
    assert result is not None
    assert result.first.kind == "compiled program"
    assert result.own_program is True
    assert str(result).startswith("only the compiled program")

    hidden = torch.compile(Gate(), backend=broken)
    hidden(x)
    result = tmm.find_nonfinite(hidden, x, torch.sum)
    assert result is not None
    assert [origin.kind for origin in result.origins] == ["compiled program", "operation"]
    assert result.others[0].operation == "aten.exp"


class MaskedLogits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(x < 0, -math.inf)


def test_masked_logits_are_no_fault_of_the_compiled_program() -> None:
    model, x = torch.compile(MaskedLogits(), backend="eager"), torch.randn(3, 8)
    assert model(x).isinf().any()
    assert tmm.find_nonfinite(model, x) is None


class Divided(nn.Module):
    def __init__(self, divisor: float) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("divisor", torch.tensor(divisor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        torch._dynamo.graph_break()
        return (y.abs() + 1) / self.divisor  # <shared graph>


def test_a_graph_that_several_modules_share_is_credited_to_the_one_that_runs() -> None:
    module = nn.Sequential(Divided(1.0), Divided(0.0))
    result = tmm.find_nonfinite(
        torch.compile(module, backend="aot_eager"), torch.randn(3, 8), torch.sum
    )
    assert result is not None
    assert_names(result.first, "shared graph", "aten.div", "1")
    assert result.first.inputs[1].comes_from == "buffer 1.divisor"
    assert [origin.module for origin in result.origins] == ["1", "1"]
    assert [origin.phase for origin in result.origins] == ["forward", "backward"]


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 2, 6])) * 0).log(),
        lambda x: torch.func.vmap(lambda row: (row * 0).log())(x),
        lambda x: torch.func.grad(lambda y: (y * 0).log().sum())(x).isfinite().float().log(),
    ],
)
def test_nested_tensors_and_function_transforms(function: Callable[..., Any]) -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        y = function(x)
        return (y.values() if y.is_nested else y).sum()

    result = tmm.find_nonfinite(step, torch.rand(6, 8).requires_grad_())
    assert result is not None
    assert result.first.operation == "aten.log"
    assert result.first.reason == "logarithm of 0 or less: 48 of 48 elements are 0"


def test_data_parallel_training_goes_on_afterwards(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        model, x = nn.parallel.DistributedDataParallel(module), torch.randn(3, 4)
        for _ in range(2):
            model(x).sum().backward()
            for program in (model, torch.compile(model, backend="eager")):
                result = tmm.find_nonfinite(program, x, lambda output: output.log().sum())
                assert result is not None
                assert result.first.operation == "aten.log"
            assert tmm.find_nonfinite(lambda x: model(x).log().sum(), x) is not None
    finally:
        torch.distributed.destroy_process_group()


def gpt2() -> tuple[transformers.GPT2LMHeadModel, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False
    )
    ids = torch.randint(0, 64, (2, 12))
    return transformers.GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_planted_weight_in_gpt2(compiled: bool) -> None:
    module, batch = gpt2()
    model = torch.compile(module, backend="aot_eager") if compiled else module
    assert compiled or tmm.find_nonfinite(model, batch) is None
    with torch.no_grad():
        module.transformer.h[1].mlp.c_fc.weight[3, 5] = 3e38
        module.transformer.h[1].ln_2.weight[3] = 1e5
    result = tmm.find_nonfinite(model, batch)
    assert result is not None
    assert result.first.operation == "aten.addmm"
    assert result.first.module == "transformer.h.1.mlp.c_fc"
    assert result.first.source is not None
    assert "addmm" in result.first.source.text
    assert result.first.inputs[2].comes_from == "parameter transformer.h.1.mlp.c_fc.weight"
    assert result.first.inputs[2].maximum == pytest.approx(3e38, rel=1e-3)
    assert "overflow of float32" in result.first.reason
    with torch.no_grad():
        module.transformer.h[1].mlp.c_fc.weight[3, 5] = math.nan
    result = tmm.find_nonfinite(module, batch)
    assert result is not None
    assert result.first.operation == "parameter transformer.h.1.mlp.c_fc.weight"
