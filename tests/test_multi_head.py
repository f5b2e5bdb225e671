"""``nn.MultiheadAttention`` in all of its settings, against the weights that torch returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import tmm

BATCH, QUERIES, KEYS, HEADS = 3, 5, 6, 2
GENERATOR = torch.Generator().manual_seed(1)
X, Y = (torch.randn(BATCH, size, 8, generator=GENERATOR) for size in (QUERIES, KEYS))
NARROW, WIDE = (torch.randn(BATCH, KEYS, size, generator=GENERATOR) for size in (4, 6))
CAUSAL = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
PADDING = torch.arange(QUERIES).expand(BATCH, QUERIES) > torch.tensor([[4], [3], [2]])
OF_HEADS = torch.randn(BATCH * HEADS, QUERIES, KEYS, generator=GENERATOR)
FURTHER: tuple[dict[str, Any], ...] = (
    {},
    {"add_zero_attn": True},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "add_bias_kv": True},
)


class Net(nn.Module):
    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, HEADS, **{"batch_first": True} | settings)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, *inputs: torch.Tensor, **options: Any) -> Any:
        return self.attention(*inputs, **options)


def entropies(weights: torch.Tensor) -> list[float]:
    weights = weights.detach().double()
    weights = weights if weights.dim() == 4 else weights[None]
    rows = -torch.special.xlogy(weights, weights).sum(-1)
    return rows.mean((0, 2)).tolist()


def expected(net: Net, inputs: tuple[torch.Tensor, ...], options: Mapping[str, Any]) -> list[float]:
    """Of the weights that torch returns, or of those that its own attention computes."""
    net.eval()  # weights of training are returned after dropout
    if options.get("need_weights", True):
        return entropies(net(*inputs, **options | {"average_attn_weights": False})[1])
    seen: list[torch.Tensor] = []
    attend = functional.scaled_dot_product_attention

    def keep(q: Any, k: Any, v: Any, mask: Any = None, p: float = 0.0, causal: bool = False) -> Any:
        logits = (q @ k.mT).double() / math.sqrt(q.shape[-1])
        if causal:
            logits = logits.masked_fill(~torch.ones(logits.shape[-2:]).tril().bool(), -math.inf)
        seen.append((logits if mask is None else logits + mask).softmax(-1))
        return attend(q, k, v, mask, p, causal)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "scaled_dot_product_attention", keep)
        net(*inputs, **options)
    return entropies(*seen)


CALLS: dict[str, tuple[tuple[torch.Tensor, ...], dict[str, Any]]] = {
    "causal": ((X, X, X), {"attn_mask": CAUSAL, "is_causal": True}),
    "causal, padded": (
        (X, X, X),
        {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDING},
    ),
    "a hint that is wrong": ((X, X, X), {"attn_mask": OF_HEADS[0, :, :5], "is_causal": True}),
    "masks of heads": ((X, Y, Y), {"attn_mask": OF_HEADS}),
    "boolean masks of heads": ((X, Y, Y), {"attn_mask": OF_HEADS > 0.9}),
    "float padding": (
        (X, X, X),
        {"key_padding_mask": torch.zeros(BATCH, QUERIES).masked_fill(PADDING, -math.inf)},
    ),
    "no batch": ((X[0], Y[0], Y[0]), {"attn_mask": OF_HEADS[:HEADS]}),
}


BOTH = FURTHER[-1]
SETTINGS = [*(("causal", further) for further in FURTHER[:-1]), *((name, BOTH) for name in CALLS)]


@pytest.mark.parametrize("need_weights", [True, False])
def test_entropies_are_those_of_the_weights(need_weights: bool) -> None:
    for name, further in SETTINGS:
        inputs, options = CALLS[name]
        torch._dynamo.reset()
        options = options | {"need_weights": need_weights}
        net = Net(dropout=0.3, **further)
        model = tmm.instrument(
            torch.compile(net, backend="eager"), tmm.Spec(tmm.attention("entropy"))
        )
        with tmm.monitor(model).step(0):
            model(*inputs, **options)
        values = tmm.monitor(model).get_step_metrics()
        tmm.remove(model)
        want = {
            f"attention_entropy/attention.head_{head}": value
            for head, value in enumerate(expected(net, inputs, options))
        }
        assert values == pytest.approx(want, rel=1e-5), (name, further)


def test_keys_and_values_of_other_sizes() -> None:
    net = Net(kdim=4, vdim=6, add_bias_kv=True)
    model = tmm.instrument(torch.compile(net, backend="eager"), tmm.Spec(tmm.attention("entropy")))
    with tmm.monitor(model).step(0):
        model(X, NARROW, WIDE)
    values = list(tmm.monitor(model).get_step_metrics().values())
    tmm.remove(model)
    assert values == pytest.approx(expected(net, (X, NARROW, WIDE), {}), rel=1e-5)


class Static(nn.Module):
    """Keys and values that are given instead of projected."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.projection = nn.Parameter(torch.randn(24, 8, generator=GENERATOR))
        self.out = nn.Parameter(torch.randn(8, 8, generator=GENERATOR))
        self.settings = settings

    def forward(self, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Any:
        return functional.multi_head_attention_forward(
            *(x, x, x, 8, HEADS, self.projection, None, None, None),
            add_zero_attn=True,
            dropout_p=0.0,
            out_proj_weight=self.out,
            out_proj_bias=None,
            static_k=keys,
            static_v=values,
            average_attn_weights=False,
            **self.settings,
        )


def test_keys_that_are_given_with_a_causal_hint() -> None:
    net = Static(attn_mask=CAUSAL, is_causal=True)
    inputs = (X.transpose(0, 1), *OF_HEADS[:, :, :4].split((BATCH * HEADS,)) * 2)
    model = tmm.instrument(torch.compile(net, backend="eager"), tmm.Spec(tmm.attention("entropy")))
    with tmm.monitor(model).step(0):
        _, weights = model(*inputs)
    values = list(tmm.monitor(model).get_step_metrics().values())
    assert values == pytest.approx(entropies(weights), rel=1e-5)
