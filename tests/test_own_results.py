"""What metric functions of users may give: numbers and real tensors, in and out of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tmm

Rule = Callable[..., tmm.Rule]

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "uncompiled": lambda net: net,
    "eager": lambda net: torch.compile(net, backend="eager"),
    "aot_eager": lambda net: torch.compile(net, backend="aot_eager"),
    "dynamic": lambda net: torch.compile(net, backend="aot_eager", dynamic=True),
}
RULES: dict[str, tuple[Rule, dict[str, str]]] = {
    "activation": (tmm.activation, {"modules": "0$"}),
    "activation_gradient": (tmm.activation_gradient, {"modules": "0$"}),
    "gradient": (tmm.gradient, {"parameters": r"0\.weight"}),
    "update": (tmm.update, {"parameters": r"0\.weight"}),
    "activation_difference": (tmm.activation_difference, {"modules": "0$"}),
    "parameter_difference": (tmm.parameter_difference, {"parameters": r"0\.weight"}),
}


def measured(family: str, way: str, function: Any, **options: Any) -> float:
    """The value of a function of a tensor of 5 or 4 rows."""
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    rule, chosen = RULES[family]
    reference = "init" if family.endswith("_difference") else None
    spec = tmm.Spec(rule(own=function, **chosen, **options), reference=reference)
    model = tmm.instrument(WAYS[way](net), spec)
    monitor = tmm.monitor(model)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    if family in ("gradient", "update", "parameter_difference"):
        monitor.watch(optimizer)
    with monitor.step(0):
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    values = monitor.get_step_metrics()
    (value,) = (v for key, v in values.items() if key.startswith(f"{family}/0"))
    return float(value)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", RULES)
def test_complex_results_are_refused(family: str, way: str) -> None:
    functions = (
        lambda x, *_: torch.fft.fft(x).sum(),
        lambda x, *_: torch.complex(x, x).mean(-1),
        lambda x, *_: torch.view_as_complex(torch.stack([x, x], -1)),
    )
    for function in functions:
        with pytest.raises((ValueError, RuntimeError), match="'own' .*it gave complex numbers"):
            measured(family, way, function)


def test_complex_results_are_refused_where_nothing_is_traced() -> None:
    for result in (1j, np.complex64(2j), torch.tensor(1j)):
        with pytest.raises(RuntimeError, match="complex|neither a number"):
            measured("activation", "aot_eager", lambda x, r=result: r, trace=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", RULES)
def test_numbers_of_python_are_measured(family: str, way: str) -> None:
    rows = 5 if family.startswith("activation") else 4
    assert measured(family, way, lambda x, *_: x.shape[0]) == rows
    assert measured(family, way, lambda x, *_: x.shape[0] / 2) == rows / 2
    assert measured(family, way, lambda x, *_: 3.5) == 3.5
    assert measured(family, way, lambda x, *_: True) == 1
    assert measured(family, way, lambda x, *_: np.float32(0.25)) == 0.25


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", RULES)
def test_what_is_neither_a_number_nor_a_tensor_is_named_as_that(family: str, way: str) -> None:
    for result in ((1, 2), None, "text", {"a": 1}):
        with pytest.raises((ValueError, RuntimeError), match="'own' .*neither a number nor a ten"):
            measured(family, way, lambda x, *_, r=result: r)


@pytest.mark.parametrize("family", ["activation", "gradient", "update"])
def test_sparse_results_count_as_dense_ones(family: str) -> None:
    for function in (torch.Tensor.to_sparse, lambda x: x.to_sparse_csr()):
        got = measured(family, "uncompiled", lambda x, f=function: f(x.abs() + 1), aggregate="min")
        assert got >= 1
