"""Each origin is checked against the very line that makes it, which carries a marker comment."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests.nonfinite_models import (
    CASES,
    HOW,
    SPEC,
    Case,
    Hidden,
    Overflow,
    assert_names,
)
from tests.ways import Counting
from tmm.nonfinite import Nonfinite

UNCOMPILED = ("not compiled", "instrumented, not compiled")


def check_case(case: Case, how: str, backend: Any, *, runs_before: bool) -> None:
    module, x = case.build()
    model = HOW[how](module, backend)
    if runs_before:
        model(x).backward()
    result = tmm.find_nonfinite(model, x)
    assert result is not None
    assert_names(result.first, case.marker, case.operation, case.module, case.phase)
    assert case.reason in result.first.reason
    assert result.first.kind == "operation"
    assert bool(result.first.reaches) is not case.hidden
    assert (result.graphs > 0) is (how not in UNCOMPILED)
    assert result.checked == "forward and backward"
    assert result.notes == ()
    if how in UNCOMPILED:
        assert result.own_program is None
    elif runs_before:
        assert result.own_program is not case.hidden
    assert (
        result.first.outputs[0].nans
        + result.first.outputs[0].positive_infinities
        + (result.first.outputs[0].negative_infinities)
    )
    assert str(result.first.source) in str(result)


SOME = [
    (case, how)
    for case in CASES
    for how in HOW
    if how in ("not compiled", "whole") or case == "first in the backward"
]
REST = [(case, how) for case in CASES for how in HOW if (case, how) not in SOME]


@pytest.mark.parametrize(("case", "how"), SOME)
def test_it_names_operation_module_and_line(case: str, how: str) -> None:
    check_case(CASES[case], how, "aot_eager", runs_before=True)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "how"), REST)
def test_it_names_them_in_all_other_ways(case: str, how: str) -> None:
    check_case(CASES[case], how, "aot_eager", runs_before=True)


@pytest.mark.parametrize("case", ["log of zero", "hidden infinity"])
def test_it_names_them_for_the_eager_backend_before_anything_ran(case: str) -> None:
    check_case(CASES[case], "whole", "eager", runs_before=False)


def test_it_names_them_for_inductor() -> None:
    check_case(CASES["log of zero"], "whole", "inductor", runs_before=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_names_all_of_them_for_inductor(case: str) -> None:
    check_case(CASES[case], "whole", "inductor", runs_before=True)


def test_looking_first_does_not_keep_the_program_from_being_compiled() -> None:
    module, x = CASES["log of zero"].build()
    backend = Counting("aot_eager")
    model = torch.compile(module, backend=backend)
    assert tmm.find_nonfinite(model, x) is not None
    assert backend.graphs == 0
    model(x)
    assert backend.graphs == 1


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype, compiled: bool) -> None:
    torch.manual_seed(0)
    module, x = Overflow(), torch.randn(2, 5, 8) * 3
    model = torch.compile(module, backend="aot_eager") if compiled else module
    assert tmm.find_nonfinite(model, x) is None
    with torch.autocast("cpu", dtype):
        result = tmm.find_nonfinite(model, x)
    if dtype is torch.bfloat16:
        assert result is None
        return
    assert result is not None
    assert_names(result.first, "float16 scores", "aten.bmm", "blocks.1")
    assert [found.dtype for found in result.first.inputs] == ["float16", "float16"]


class InnerAutocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Overflow()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.float16):
            return self.inner(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_inside_of_the_model(compiled: bool) -> None:
    torch.manual_seed(0)
    module, x = InnerAutocast(), torch.randn(2, 5, 8) * 3
    result = tmm.find_nonfinite(torch.compile(module, backend="eager") if compiled else module, x)
    assert result is not None
    assert_names(result.first, "float16 scores", "aten.bmm", "inner.blocks.1")


# Step functions and losses


def test_a_loss_of_its_own() -> None:
    model, x, y = nn.Linear(4, 4), torch.randn(3, 4), torch.rand(3, 4)
    p = nn.Sequential(model, nn.ReLU(), nn.Threshold(1e9, 0.0))

    def loss(output: torch.Tensor) -> torch.Tensor:
        return -(y * output.log()).mean()  # <log in a loss>

    for compiled in (p, torch.compile(p, backend="aot_eager")):
        result = tmm.find_nonfinite(compiled, x, loss)
        assert result is not None
        assert_names(result.first, "log in a loss", "aten.log", "")
        assert result.first.inputs[0].zeros == 12
        assert "loss" in result.first.reaches
        assert "outside of modules" in str(result)


def test_a_step_function_and_its_modules() -> None:
    model, criterion = Hidden(), nn.MSELoss()
    x, y = torch.randn(2, 5, 8), torch.tensor(float("nan"))

    def step(x: torch.Tensor) -> torch.Tensor:
        return criterion(model(x), torch.ones(()) * 2).sqrt().log()

    result = tmm.find_nonfinite(step, x)
    assert result is not None
    assert_names(result.first, "hidden infinity", "aten.exp", "gate")
    assert tmm.find_nonfinite(step, (x,), module=model) == result
    compiled = tmm.find_nonfinite(torch.compile(step, backend="aot_eager"), x, module=model)
    assert compiled is not None
    assert compiled.graphs
    assert compiled.origins[0].source == result.origins[0].source

    given = tmm.find_nonfinite(lambda x, y: criterion(model(x), y), (x, y))
    assert given is not None
    assert given.first.operation == "batch[1]"


def test_a_step_function_whose_model_is_compiled() -> None:
    module, x = CASES["log of zero"].build()
    model = torch.compile(module, backend="aot_eager")
    result = tmm.find_nonfinite(lambda x: model(x) * 2, x)
    assert result is not None
    assert result.graphs == 2
    assert_names(result.first, "log of zero", "aten.log", "[root module]")


def test_an_instrumented_step_function() -> None:
    module, x = CASES["log of zero"].build()

    def step(x: torch.Tensor) -> torch.Tensor:
        return module(x) * 2

    compiled = torch.compile(step, backend="aot_eager")
    model = tmm.instrument(compiled, SPEC, module=module)
    for _ in range(2):
        result = tmm.find_nonfinite(model, x)
        assert result is not None
        assert result.graphs == 2
        assert_names(result.first, "log of zero", "aten.log", "[root module]")


def test_without_a_loss_the_forward_pass_is_checked_and_it_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LogSigmoid())
    assert tmm.find_nonfinite(model, torch.randn(3, 4)) is None
    result = tmm.find_nonfinite(model, torch.full((3, 4), math.inf))
    assert result is not None
    assert result.checked == "forward"
    assert "no backward pass" in str(result)
    assert result.first.operation == "batch"
    assert result.first.reaches == ("output",)


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match=r"loss= returned a tensor of shape \(3, 4\)"):
        tmm.find_nonfinite(nn.Linear(4, 4), torch.randn(3, 4), lambda output: output)
    with pytest.raises(ValueError, match="module= goes with a step function"):
        tmm.find_nonfinite(nn.Linear(4, 4), torch.randn(3, 4), module=nn.Linear(4, 4))
    with pytest.raises(TypeError, match="neither a module nor a function"):
        tmm.find_nonfinite(3, torch.randn(3, 4))  # type: ignore[arg-type]
    linear = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"called backward\(\); let it give back the loss"):
        tmm.find_nonfinite(lambda x: linear(x).sum().backward(), torch.randn(3, 4))
    assert linear.weight.grad is None
    with pytest.raises(TypeError, match="ScriptModule"):
        tmm.find_nonfinite(torch.jit.script(nn.Linear(4, 4)), torch.randn(3, 4))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        tmm.find_nonfinite(nn.Linear(4, 4), torch.randn(3, 5))


# What was given


def test_a_batch_parameter_or_buffer_that_is_not_finite() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    x = torch.randn(3, 4)
    bad = x.clone()
    bad[2, 1] = math.nan
    result = tmm.find_nonfinite(model, bad, torch.sum)
    assert result is not None
    assert (result.first.kind, result.first.operation) == ("batch", "batch")
    assert result.first.reason == "1 of 12 elements, the first one at [2, 1]"
    assert "loss" in result.first.reaches
    assert "buffer 1.running_mean" in result.first.reaches
    assert str(result).startswith("NaN in batch, before anything ran")

    with torch.no_grad():
        model[0].weight[1, 2] = math.inf
    result = tmm.find_nonfinite(model, x, torch.sum)
    assert result is not None
    assert (result.first.kind, result.first.operation) == ("parameter", "parameter 0.weight")
    assert result.first.module == "0"
    assert result.first.becomes_nan

    with torch.no_grad():
        model[0].weight[1, 2] = 0
        model[1].running_var[0] = math.nan
    model.eval()
    result = tmm.find_nonfinite(model, x, torch.sum)
    assert result is not None
    assert (result.first.kind, result.first.operation) == ("buffer", "buffer 1.running_var")


def test_uninitialized_memory_counts_once_it_is_read() -> None:
    def fill(x: torch.Tensor, rows: int, read: int) -> torch.Tensor:
        memory = torch.empty(4, 3)  # <uninitialized>
        memory[:rows] = x[:rows]
        return memory[:read].sum()

    x = torch.randn(4, 3)
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        assert tmm.find_nonfinite(lambda x: fill(x, 4, 4), x) is None
        assert tmm.find_nonfinite(lambda x: fill(x, 2, 2), x) is None
        result = tmm.find_nonfinite(lambda x: fill(x, 2, 3), x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert result is not None
    assert_names(result.first, "uninitialized", "aten.empty", "")
    assert result.first.kind == "uninitialized"
    assert result.first.reaches == ("loss",)


def test_the_report_reads_well() -> None:
    module, x = CASES["overflow in float16 attention"].build()
    result = tmm.find_nonfinite(module, x)
    assert isinstance(result, Nonfinite)
    text = str(result)
    assert text.splitlines()[0] == "infinity made by aten.bmm, forward of blocks.1"
    assert "scores = query @ key.transpose(-1, -2)" in text
    assert "input mat2 (aten.mul" in text
    assert "becomes NaN in aten._softmax" in text
    assert text.splitlines()[-1] == "checked: forward and backward, eagerly"


def test_a_loss_that_is_no_function_is_named() -> None:
    with pytest.raises(TypeError, match="loss=3 is not a function"):
        tmm.find_nonfinite(torch.nn.Linear(2, 2), torch.ones(1, 2), 3)  # type: ignore[arg-type]


def test_a_function_without_a_loss_is_told() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="only the forward pass was checked"):
        assert tmm.find_nonfinite(lambda x: print(model(x).shape), (torch.ones(1, 2),)) is None
