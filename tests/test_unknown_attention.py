"""Attention written out in ways that are not known: named with its module, and nothing else is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import tmm

Call = Callable[..., torch.Tensor]


class Attention(nn.Module):
    """Parameters that attentions, layers and routers have, and what is done with them."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = call
        self.sinks = nn.Parameter(torch.zeros(3))
        self.mix = nn.Parameter(torch.randn(3, 3))
        self.router = nn.Parameter(torch.randn(4, 4))
        self.classes = nn.Parameter(torch.randn(11, 4))
        self.first = nn.Parameter(torch.randn(5, 4, 8))
        self.second = nn.Parameter(torch.randn(5, 8, 4))
        self.register_buffer("features", torch.randn(4, 16))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.call(self, q, k, v)


class Net(nn.Module):
    def __init__(self, call: Call) -> None:
        super().__init__()
        self.attention = Attention(call)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.attention(q, k, v)
        return output


def batch() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, 6, 4, generator=generator) for _ in "qkv")


def measured(call: Call, steps: int = 1) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Values, what was not measured, and the warnings."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = tmm.instrument(
        torch.compile(Net(call), backend="eager"), tmm.Spec(tmm.attention("entropy"))
    )
    monitor = tmm.monitor(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(steps):
            with monitor.step(step):
                model(*batch())
    texts = [str(w.message) for w in said if issubclass(w.category, tmm.MonitoringWarning)]
    return monitor.get_step_metrics(), tmm.explain(model).unmeasured, texts


def with_sinks(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As gpt-oss of transformers does it."""
    sinks = net.sinks.view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)
    both = torch.cat([q @ k.mT * 0.5, sinks], dim=-1)
    both = both - both.max(dim=-1, keepdim=True).values
    return torch.softmax(both, dim=-1)[..., :-1] @ v


def shared(exponentials: torch.Tensor, further: float = 0.0) -> torch.Tensor:
    return exponentials / (exponentials.sum(-1, keepdim=True) + further)


def sparsemax(logits: torch.Tensor) -> torch.Tensor:
    ordered, _ = torch.sort(logits, -1, descending=True)
    sums = ordered.cumsum(-1) - 1
    places = torch.arange(1, logits.shape[-1] + 1)
    support = (places * ordered > sums).sum(-1, keepdim=True)
    return (logits - sums.gather(-1, support - 1) / support).clamp(min=0)


def scattered(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    logits = q @ k.mT
    largest, places = logits.topk(3, -1)
    return torch.zeros_like(logits).scatter(-1, places, largest.softmax(-1)) @ v


def by_sums(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1).softmax(-1)
    return (weights[..., None] * v[:, :, None]).sum(-2)


def by_einsum(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = shared(torch.einsum("bhid,bhjd->bhij", q, k).exp())
    return torch.einsum("bhij,bhjd->bhid", weights, v)


def in_cond(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax(q @ k.mT, -1) @ v

    return torch.cond(q.sum() > 0, attend, lambda q, k, v: v.clone(), (q, k, v))


OPERATOR = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

UNKNOWN: dict[str, tuple[Call, str]] = {
    "sinks": (with_sinks, "by way of mul, cat, sub, softmax"),
    "exp over its sum": (lambda _, q, k, v: shared(torch.exp(q @ k.mT)) @ v, "by way of exp"),
    "softmax of one more": (lambda _, q, k, v: shared((q @ k.mT).exp(), 1.0) @ v, "by way of exp"),
    "sigmoid": (lambda _, q, k, v: torch.sigmoid(q @ k.mT - 2) @ v, "by way of sub, sigmoid"),
    "relu": (lambda _, q, k, v: torch.relu(q @ k.mT) / 6 @ v, "by way of relu"),
    "softmin": (lambda _, q, k, v: functional.softmin(q @ k.mT, -1) @ v, "by way of softmin"),
    "sparsemax": (lambda _, q, k, v: sparsemax(q @ k.mT) @ v, "by way of sort"),
    "the largest only": (scattered, "by way of topk, softmax, scatter"),
    "sums": (by_sums, "by way of softmax"),
    "einsum": (by_einsum, "by way of exp"),
    "one head": (lambda _, q, k, v: torch.softmax(q[0, 0] @ k[0, 0].T, -1) @ v[0, 0], "the heads"),
    "talking heads": (
        lambda net, q, k, v: torch.einsum("gh,bhij->bgij", net.mix, (q @ k.mT).softmax(-1)) @ v,
        "what it weighs is not known",
    ),
    "in cond": (in_cond, "inside cond"),
    "an operator": (lambda _, q, k, v: OPERATOR(q, k, v)[0], "_flash_attention_for_cpu"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_attention_is_named_and_warned_of_once(kind: str) -> None:
    call, reason = UNKNOWN[kind]
    values, unmeasured, said = measured(call, steps=2)
    assert values == {}
    assert reason in unmeasured["attention (attention)"]
    assert len(said) == 1
    assert "attention (attention)" in said[0]


def exact(call: Call) -> torch.Tensor:
    """Entropies of the softmax that ``call`` makes of the logits, float64."""
    q, k, _ = (part.double() for part in batch())
    p = call(q @ k.mT)
    return -torch.special.xlogy(p, p).sum(-1).mean((0, 2))


@pytest.mark.parametrize(
    "softmax",
    [
        lambda logits: torch.log_softmax(logits, -1).exp(),
        lambda logits: torch.exp(functional.log_softmax(logits, dim=3)),
        lambda logits: torch.special.softmax(logits, -1),
        lambda logits: nn.Softmax(-1)(logits.float()).to(logits.dtype),
    ],
)
def test_further_ways_to_write_a_softmax_are_measured(
    softmax: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    values, unmeasured, said = measured(lambda _, q, k, v: softmax(q @ k.mT) @ v)
    want = {
        f"attention_entropy/attention.head_{head}": float(value)
        for head, value in enumerate(exact(softmax))
    }
    assert values == pytest.approx(want, rel=1e-5)
    assert (unmeasured, said) == ({}, [])


def expert_layer(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    x = q[:, 0]
    gates = (x @ net.router).softmax(-1)
    hidden = torch.einsum("btd,edf->betf", x, net.first[:4]).relu()
    outputs = torch.einsum("betf,efd->betd", hidden, net.second[:4])
    return torch.einsum("bte,betd->btd", gates, outputs)


def chosen_experts(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    x = q[:, 0, :1]
    chosen = functional.linear(x, net.router).softmax(-1).argmax(-1)[:, 0]
    hidden = torch.bmm(x, net.first[chosen]).relu()
    return torch.bmm(hidden, net.second[chosen])


def contrastive(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    logits = q[0, 0] @ k[0, 0].T
    loss = functional.cross_entropy(logits, torch.arange(6))
    return loss - (torch.eye(6) * torch.log_softmax(logits, -1)).sum(1).mean()


def scan(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A product whose layer makes the step sizes of another one, as in Mamba."""
    steps = functional.softplus(net.router @ q.mT).mT
    states = q @ k.mT @ v
    return functional.softplus(functional.linear(states, net.router)) @ k.mT * steps.mean()


OTHERS: dict[str, Call] = {
    "scans": scan,
    "layers": lambda net, q, k, v: torch.relu(q @ net.first[0]) @ net.second[0],
    "a gated layer": lambda net, q, k, v: torch.sigmoid(q @ net.router) * k @ net.router,
    "experts": expert_layer,
    "chosen experts": chosen_experts,
    "a router": lambda net, q, k, v: functional.linear(q, net.router).softmax(-1) @ v[..., :4, :],
    "a contrastive loss": contrastive,
    "a classifier": lambda net, q, k, v: torch.softmax(q[:, 0] @ net.classes.T, -1),
    "distillation": lambda net, q, k, v: (q.softmax(-1) * (k @ net.router).log_softmax(-1)).sum(-1),
    "learned weights": lambda net, q, k, v: torch.softmax(net.mix, -1) @ q[..., :3, :],
    "random features": lambda net, q, k, v: torch.exp(q @ net.features) @ net.features.T,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_routers_and_losses_are_no_attention(kind: str) -> None:
    values, unmeasured, said = measured(OTHERS[kind])
    assert (values, unmeasured) == ({}, {})
    assert len(said) == 1  # that the rule has found nothing in the whole model
    assert "tmm.attention('entropy'): no attention that is known was found in the 2" in said[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda _, q, k, v: torch.softmax(torch.softmax(q @ k.mT, -1) @ v @ k.mT, -1) @ v,
        lambda _, q, k, v: torch.softmax(q @ k.mT, -1) @ (torch.softmax(k @ q.mT, -1) @ v),
    ],
)
def test_the_output_of_one_attention_may_enter_another(call: Call) -> None:
    values, unmeasured, said = measured(call)
    assert len(values) == 6
    assert (unmeasured, said) == ({}, [])


def test_an_unknown_attention_does_not_number_the_others() -> None:
    def both(net: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return functional.scaled_dot_product_attention(with_sinks(net, q, k, v), k, v)

    values, unmeasured, said = measured(both)
    assert list(values) == [f"attention_entropy/attention.head_{head}" for head in range(3)]
    assert "cat" in unmeasured["attention (attention)"]
    assert len(said) == 1


MASK = torch.rand(6, 6, generator=torch.Generator().manual_seed(3)) > 0.6
OF_KEYS = torch.rand(2, 1, 1, 6, generator=torch.Generator().manual_seed(4)) > 0.6
BIAS = torch.randn(3, 6, 6, generator=torch.Generator().manual_seed(5))
SMALLEST = torch.finfo(torch.float16).min

FILLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scaled down": lambda a: a.masked_fill(MASK, -1e4) * 1e-3,
    "negative": lambda a: a.masked_fill(MASK, -1e4) * -0.01,
    "negative twice": lambda a: (a.masked_fill(MASK, -1e4) * -1.0) * -1e-3,
    "divided": lambda a: a.masked_fill(OF_KEYS, -1e4) / 1000,
    "chosen": lambda a: torch.where(MASK, -2e4, a) / 2e4,
    "by a constant tensor": lambda a: a.masked_fill(MASK, -1e4) * torch.full([], 0.001),
    "in place": lambda a: a.masked_fill(MASK, -1e4).mul_(1e-3),
    "of float16": lambda a: (a.half().masked_fill(MASK, SMALLEST) * 1e-3).float(),
    "added to": lambda a: a.masked_fill(MASK, -1e4) + BIAS * 10 + 1e4 * OF_KEYS,
    "two": lambda a: (a.masked_fill(MASK, -1e4) * 1e-3).masked_fill(OF_KEYS, -math.inf),
    "no mask at all": lambda a: a.masked_fill(MASK, 0.5),
    "still hidden": lambda a: a.masked_fill(MASK, -1e9) * 0.25,
    "infinite": lambda a: a.masked_fill(OF_KEYS, -math.inf) * 0.25,
}
STATISTICS = ("entropy", "max_logit", "sink_mass", "logsumexp", "max_probability")


def statistics(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    p = logits.softmax(-1)
    rows = {
        "entropy": -torch.special.xlogy(p, p).sum(-1),
        "sink_mass": p[..., 0],
        "logsumexp": logits.logsumexp(-1),
        "max_probability": p.amax(-1),
    }
    means = {name: row.mean((0, 2)) for name, row in rows.items()}
    return means | {"max_logit": logits.amax((0, 2, 3))}


@pytest.mark.parametrize(
    ("kind", "joined"),
    [*((kind, False) for kind in FILLS), ("scaled down", True), ("still hidden", True)],
)
def test_a_filled_logit_counts_as_what_the_softmax_gets(kind: str, joined: bool) -> None:
    fill = FILLS[kind]

    def call(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if joined:
            logits = fill(q.flatten(0, 1) @ k.flatten(0, 1).mT).view(2, 3, 6, 6)
        else:
            logits = fill(q @ k.mT)
        return torch.softmax(logits, -1) @ v

    torch._dynamo.reset()
    rule = tmm.attention(*STATISTICS)
    model = tmm.instrument(torch.compile(Net(call), backend="eager"), tmm.Spec(rule))
    with tmm.monitor(model).step(0):
        model(*batch())
    q, k, _ = (part.double() for part in batch())
    want = {
        f"attention_{name}/attention.head_{head}": float(value)
        for name, values in statistics(fill(q @ k.mT).double()).items()
        for head, value in enumerate(values)
    }
    tolerance = 2e-3 if kind == "of float16" else 1e-5
    assert tmm.monitor(model).get_step_metrics() == pytest.approx(want, rel=tolerance, abs=1e-6)


@pytest.mark.parametrize("factor", [-1.0, 0.0])
def test_logits_that_become_infinite_or_nan_are_said_to_be(factor: float) -> None:
    def call(_: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax((q @ k.mT).masked_fill(MASK, -math.inf) * factor, -1) @ v

    values, *_ = measured(call)
    assert len(values) == 3
    assert all(math.isnan(value) for value in values.values())
