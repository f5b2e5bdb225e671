"""Attention in single graphs: what is matched, what is inserted, and what stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional

from tests.graphs import NOTHING, applied, check_golden, text, trace
from tmm.core.metrics import builtin_reductions
from tmm.core.records import AttentionRequest
from tmm.passes.attention.find_calls import find_attention
from tmm.passes.attention.found import FoundAttention
from tmm.passes.graph.copy import copy_graph
from tmm.passes.insert_attention import insert_attention
from tmm.passes.pack_rows import pack_rows
from tmm.passes.remove_taps import remove_taps
from tmm.passes.request import GraphRequest

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """Two heads, called in a way that is given."""

    def __init__(self, call: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.fc, self.call = nn.Linear(4, 4), call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.fc(x).unflatten(-1, (2, 2)).transpose(1, 2)
        return self.call(heads, heads, heads)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(2) + 1.5 * v[..., :1], -1) @ v


def options_for(module: nn.Module, *names: str, pooled: bool = False) -> GraphRequest:
    reductions = builtin_reductions(names, is_complex=False)
    request = AttentionRequest(
        tuple(r for r in reductions if r.is_of_attention),
        tuple(r for r in reductions if not r.is_of_attention),
        pooled,
    )
    modules = {id(child): name for name, child in module.named_modules()}
    asked = (request,) if names else ()
    return replace(NOTHING, modules=modules, select_attention=lambda name: () if name else asked)


def traced(module: nn.Module) -> GraphModule:
    return copy_graph(trace(module, X))


@pytest.mark.parametrize("call", [causal, by_hand])
def test_golden(call: Callable[..., torch.Tensor]) -> None:
    module = Small(call)
    graph = traced(module)
    before = text(graph)
    options = options_for(module, "entropy", "max_logit", "rms")
    assert applied(insert_attention, graph, options).unmeasured == []
    name = f"insert_attention_{call.__name__}"
    check_golden(name, before + "\n# becomes\n\n" + text(graph))


@pytest.mark.parametrize("pooled", [False, True])
def test_rows_lie_one_after_the_other_and_the_program_is_as_before(pooled: bool) -> None:
    module = Small(causal)
    graph = traced(module)
    options = options_for(module, "entropy", "max_logit", "rms", pooled=pooled)
    applied(insert_attention, graph, options)
    applied(remove_taps, graph)
    layout = applied(pack_rows, graph).layout
    graph.recompile()
    assert len(layout.slots) == (2 + 4) * (1 if pooled else 2)
    ends = [0, *(row.indices[-1] + 1 for row in layout.slots)]
    assert [row.indices[0] for row in layout.slots] == ends[:-1]
    inputs = [node.meta["real"] for node in graph.graph.find_nodes(op="placeholder")]
    output, packed = graph(*inputs)
    assert torch.equal(output, module(X))
    assert packed.shape == (ends[-1],)


def test_it_is_idempotent_and_leaves_what_is_not_asked_for_alone() -> None:
    module = Small(causal)
    graph = traced(module)
    untouched = text(graph)
    applied(insert_attention, graph, options_for(module))
    assert text(graph) == untouched
    options = options_for(module, "entropy")
    applied(insert_attention, graph, options)
    once = text(graph)
    assert once != untouched
    applied(insert_attention, graph, options)
    assert text(graph) == once


def test_a_mask_of_the_logits_and_their_scale_are_found() -> None:
    (found,) = find_attention(traced(Small(by_hand)))
    assert isinstance(found, FoundAttention)
    assert found.scale == pytest.approx(1 / math.sqrt(2))
    assert [mask.kind for mask in found.masks] == ["added"]
    assert found.key_is_turned


def overwriting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k = k.clone()
    logits = q @ k.mT
    k.mul_(2)
    return torch.softmax(logits, -1) @ v


def test_tensors_that_are_overwritten_before_they_could_be_read_are_refused() -> None:
    module = Small(overwriting)
    graph = traced(module)
    ((site, reason),) = applied(insert_attention, graph, options_for(module, "entropy")).unmeasured
    assert site.path == " (attention)"
    assert "overwritten" in reason
