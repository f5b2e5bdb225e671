"""Which infinities are meant, and what is said of the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests.nonfinite_models import (
    assert_line,
    assert_names,
)

# Infinities that are meant


class Masked(nn.Module):
    """A causal mask of -inf, in one of the ways of making one."""

    def __init__(self, kind: str, masked_rows: int = 0) -> None:
        super().__init__()
        self.kind, self.masked_rows = kind, masked_rows
        self.project = nn.Linear(8, 8)
        self.register_buffer("mask", torch.full((5, 5), -math.inf).triu(1))
        self.constant = torch.full((5, 5), -math.inf).triu(1)

    def forward(self, x: torch.Tensor, given: torch.Tensor | None = None) -> torch.Tensor:
        scores = self.project(x) @ x.transpose(-1, -2)
        allowed = torch.ones(5, 5, dtype=torch.bool).tril()
        allowed = allowed & (torch.arange(5)[:, None] >= self.masked_rows)
        if self.kind == "fill":
            scores = scores.masked_fill(~allowed, -math.inf)
        elif self.kind == "fill in place":
            scores.masked_fill_(~allowed, float("-inf"))
        elif self.kind == "where":
            scores = torch.where(allowed, scores, float("-inf"))
        elif self.kind == "full":
            scores = scores + torch.full((5, 5), -math.inf).masked_fill(allowed, 0.0)
        elif self.kind == "tensor":
            scores = torch.where(allowed, scores, torch.tensor(-math.inf))
        elif self.kind == "indexed":
            scores = scores.clone()
            scores[..., ~allowed] = -math.inf
        elif self.kind == "buffer":
            scores = scores + self.mask
        elif self.kind == "attribute":
            scores = scores + self.constant
        elif self.kind == "given":
            scores = scores + given
        elif self.kind == "torch":
            return nn.functional.scaled_dot_product_attention(x, x, self.project(x), allowed).sum()
        else:
            return nn.functional.scaled_dot_product_attention(
                x, x, self.project(x), is_causal=True
            ).sum()
        return (scores.softmax(-1) @ x).sum()  # <masked softmax>


MASKS = ("fill", "fill in place", "where", "full", "tensor", "indexed", "buffer", "attribute")


KINDS = (*MASKS, "given", "torch", "causal")


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [(kind, False) for kind in KINDS] + [(kind, True) for kind in ("fill", "buffer", "torch")],
)
def test_masks_of_infinities_are_no_finding(kind: str, compiled: bool) -> None:
    model: Any = Masked(kind)
    batch = {"x": torch.randn(2, 5, 8), "given": torch.full((5, 5), -math.inf).triu(1)}
    model = torch.compile(model, backend="aot_eager") if compiled else model
    result = tmm.find_nonfinite(model, batch)
    assert result is None, str(result)


@pytest.mark.parametrize(("kind", "compiled"), [("fill", False), ("where", True), ("full", False)])
def test_a_row_that_is_masked_entirely_is_the_softmax_s_fault(kind: str, compiled: bool) -> None:
    model: Any = Masked(kind, masked_rows=2)
    model = torch.compile(model, backend="aot_eager") if compiled else model
    result = tmm.find_nonfinite(model, torch.randn(3, 5, 8))
    assert result is not None
    assert_names(result.first, "masked softmax", "aten._softmax", "[root module]")
    assert "6 of 15 rows hold nothing but -inf" in result.first.reason
    assert result.first.inputs[0].negative_infinities == 3 * (10 + 3)
    assert "loss" in result.first.reaches


def test_a_literal_that_reaches_the_loss_is_a_finding() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return (x.masked_fill(x > 0, math.inf) * 0.5).sum()  # <literal>

    result = tmm.find_nonfinite(step, torch.randn(3, 5, requires_grad=True))
    assert result is not None
    assert_names(result.first, "literal", "aten.masked_fill", "")
    assert result.first.kind == "literal"
    assert result.first.reaches == ("loss",)


def test_an_overflow_beside_masked_elements_is_seen() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        scores = x.masked_fill(x < 0, -math.inf)
        return (scores * 1e38).exp().reciprocal().clamp(max=1).sum()  # <beside a mask>

    result = tmm.find_nonfinite(step, torch.tensor([-1.0, 2.0, 30.0]))
    assert result is not None
    assert_names(result.first, "beside a mask", "aten.mul", "")
    assert "overflow of float32: the largest result is 3e+39" in result.first.reason


# Other operations, and what they say


@pytest.mark.parametrize(
    ("function", "operation", "reason"),
    [
        (lambda x: (x - 9).sqrt(), "aten.sqrt", "root of a negative number: 4 of 4"),
        (lambda x: (x * 0).rsqrt(), "aten.rsqrt", "4 of 4 elements are 0"),
        (lambda x: (x * 0).reciprocal(), "aten.reciprocal", "division by zero: 4 of 4"),
        (lambda x: 1 / (x * 0), "aten.reciprocal", "division by zero: 4 of 4"),
        (lambda x: x / 0, "aten.div", "division by zero"),
        (lambda x: (x * 0) / (x * 0), "aten.div", "4 of 4 divisors are 0; 4 of the results"),
        (lambda x: (x * 0 - 1).log1p(), "aten.log1p", "4 of 4 elements are -1"),
        (lambda x: (-x).pow(0.5), "aten.pow", "4 negative bases"),
        (lambda x: (x * 0).pow(-2), "aten.pow", "4 bases are 0"),
        (lambda x: (x + 9).acos(), "aten.acos", "4 of 4 elements are beyond"),
        (lambda x: x[:1].std(), "aten.std", "0 degrees of freedom"),
        (lambda x: x[:0].mean(), "aten.mean", "the mean of no elements"),
        (lambda x: (x * 1e30).square(), "aten.pow", "overflow of float32"),
        (lambda x: (x * 1e5).half().float(), "aten._to_copy", "float16 ends at 65504"),
        (lambda x: (x * 0).log() * 0, "aten.log", "4 of 4 elements are 0"),
        (
            lambda x: nn.functional.cross_entropy(x[None], torch.tensor([-100])),
            *("aten.nll_loss_forward", "all targets are ignored"),
        ),
        (lambda x: (x.double() * 1e300).square().float(), "aten.pow", "overflow of float64"),
    ],
)
def test_the_reason_is_computed(
    function: Callable[[torch.Tensor], torch.Tensor], operation: str, reason: str
) -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    result = tmm.find_nonfinite(lambda x: function(x).sum(), x)
    assert result is not None
    assert result.first.operation == operation
    assert reason in result.first.reason, result.first.reason


def test_no_reason_is_given_where_none_is_proven() -> None:
    probabilities, targets = torch.randn(8, 1, 4).log_softmax(-1), torch.tensor([[1, 2]])
    lengths = torch.tensor([8]), torch.tensor([2])
    result = tmm.find_nonfinite(
        lambda x: nn.functional.ctc_loss(x, targets, *lengths), probabilities
    )
    assert result is not None  # its own table holds logarithms of 0
    assert (result.first.operation, result.first.reason) == ("aten._ctc_loss", "")
    assert not result.first.reaches

    x = torch.zeros(3, 3)
    result = tmm.find_nonfinite(lambda x: torch.linalg.cond(x).sum(), x)
    assert result is not None
    assert result.first.source is not None


def test_a_fused_attention_that_overflows_is_one_operation() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x * 30, scale=1e9).sum()  # <fused>

    x = (torch.ones(1, 2, 5, 8) * 4000).half()
    result = tmm.find_nonfinite(step, x)
    assert result is not None
    assert_names(result.first, "fused", "aten.mul", "")
    value = torch.full_like(x, 60000)

    def attend(x: torch.Tensor) -> torch.Tensor:
        query = x * torch.tensor([1e38], dtype=torch.float32)
        return nn.functional.scaled_dot_product_attention(query, query, query).sum()  # <flash>

    result = tmm.find_nonfinite(attend, value.float()[..., :4] / 60000)
    assert result is not None
    assert result.first.operation.startswith("aten._scaled_dot_product")
    assert_line(result.first, "flash")
