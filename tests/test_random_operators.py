"""A reference draws no random numbers, whichever operator of torch draws them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import tmm
from tmm.passes.graph.dropout_functions import random_function

Function = Callable[[torch.Tensor], torch.Tensor]


@torch.library.custom_op(
    "tmm_tests::scatter", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def scatter(x: torch.Tensor) -> torch.Tensor:
    return x + torch.randn_like(x)


@scatter.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


scatter.register_autograd(lambda context, gradient: gradient)

SHARED: dict[str, tuple[Function, tuple[int, ...]]] = {
    "channels of one item": (lambda x: functional.dropout1d(x, 0.4), (4, 8)),
    "channels of a batch": (lambda x: functional.dropout1d(x, 0.4), (2, 4, 8)),
    "channels of pictures": (lambda x: functional.dropout2d(x, 0.4), (2, 4, 3, 8)),
    "channels of one picture": (lambda x: functional.dropout2d(x, 0.4), (4, 3, 8)),
    "channels of one volume": (lambda x: functional.dropout3d(x, 0.4), (4, 2, 3, 8)),
    "channels of volumes": (lambda x: functional.dropout3d(x, 0.4), (2, 4, 2, 3, 8)),
}
APART: dict[str, tuple[Function, tuple[int, ...]]] = {
    "torch.feature_dropout": (lambda x: torch.feature_dropout(x, 0.4, True), (4, 8)),
    "torch.native_dropout": (lambda x: torch.native_dropout(x, 0.4, True)[0], (4, 8)),
    "torch.rrelu": (lambda x: torch.rrelu(x, 0.1, 0.4, True), (4, 8)),
    "torch._standard_gamma": (lambda x: torch._standard_gamma(x.exp()), (4, 8)),
    "an operator of a user": (lambda x: scatter(x), (4, 8)),
}


class Net(nn.Module):
    """A layer, and something that draws after it."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.fc(x))


def trained(model: nn.Module, net: Net, x: torch.Tensor) -> list[torch.Tensor]:
    """What one step of a training gives, and leaves as the random state."""
    torch.manual_seed(1)
    net.zero_grad()
    output: torch.Tensor = model(x)
    output.square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return [output.detach(), torch.get_rng_state(), *gradients]


@pytest.mark.filterwarnings("ignore:.*cannot be compared with the reference")
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("case", [*SHARED, *APART])
def test_a_training_draws_what_it_draws_without_a_reference(case: str, backend: str | None) -> None:
    function, shape = (SHARED | APART)[case]
    net, x = Net(function).double(), torch.randn(shape, dtype=torch.float64)
    reference = copy.deepcopy(net)
    with torch.no_grad():
        net.fc.weight.mul_(1.5)
    compiled: nn.Module = net if backend is None else torch.compile(net, backend=backend)  # type: ignore[assignment]
    plain = trained(compiled, net, x)
    torch._dynamo.reset()
    spec = tmm.Spec(tmm.activation_difference("norm"), reference=reference)
    model = tmm.instrument(compiled, spec)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        measured = trained(model, net, x)
    for mine, theirs in zip(measured, plain, strict=True):
        assert torch.equal(mine, theirs)
    got, key = monitor.get_step_metrics(), "activation_difference/[root module]/norm"
    assert "activation_difference/fc/norm" in got
    if case in APART:
        assert key not in got
        assert "draws random numbers" in tmm.explain(model).unmeasured["[root module]"]
        return
    torch.manual_seed(1)
    expected = (plain[0] - reference(x)).norm().item()
    assert got[key] == pytest.approx(expected, rel=1e-12)
    assert expected > 0


@pytest.mark.parametrize(
    ("target", "args", "draws"),
    [
        (torch.feature_dropout, (0.4, True), True),
        *[
            (torch.feature_dropout, (0.4, False), False),
            (torch.feature_dropout, (0.0, True), False),
        ],
        *[(torch.native_dropout, (0.5, True), True), (torch.native_dropout, (0.5, False), False)],
        *[(torch.rrelu, (), False), (torch.rrelu, (0.1, 0.3, True), True)],
        *[(torch.ops.aten.bernoulli.default, (), True), (torch.ops.aten.bernoulli, (), True)],
        *[(torch.add, (1,), False), (torch.rand_like, (), False), (torch.empty_like, (), False)],
        *[(scatter._opoverload, (), True), (functional.relu, (), False)],
    ],
)
def test_which_operators_draw(target: Any, args: tuple[Any, ...], draws: bool) -> None:
    assert (random_function(target, (torch.ones(3), *args), {}) is not None) is draws


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("is_packed", [False, True])
def test_recurrent_layers_draw_if_they_drop(dropout: float, is_packed: bool) -> None:
    x = torch.ones(3)
    sizes = (torch.ones(1, dtype=torch.int64),) if is_packed else ()
    last = () if is_packed else (False,)
    args = (x, *sizes, [x], [x], True, 2, dropout, True, False, *last)
    assert (random_function(torch.lstm, args, {}) is not None) is (dropout > 0)
    assert (random_function(torch.gru, args, {}) is not None) is (dropout > 0)
