"""Calls of modules that are marked without hooks: whatever way a program calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import tmm
from tests.eager_hooks import assert_agrees, record_calls, run_calls, tolerance
from tmm.instrumentation.traced_calls import markable_without_hooks

METRICS = ("rms", "absmax", "nan_count")


class Overriding(nn.Linear):
    """Does something after its hooks, as ``GradientCheckpointingLayer`` may."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs) + 1


class Given(nn.Module):
    """Gives what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Any]:
        y = self.fc(x)
        return {"out": y * scale, "all": (y, [y.detach(), None, 3]), "same": x}


class Static(nn.Module):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.exp()


def directly(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x))


def dunder(net: Any, x: Tensor) -> Tensor:
    return net.b.__call__(net.a.__call__(x))


def call_impl(net: Any, x: Tensor) -> Tensor:
    return net.b._call_impl(net.a._wrapped_call_impl(x))


def forward_alone(net: Any, x: Tensor) -> Tensor:
    """No hook sees it."""
    return net.b(net.a.forward(x))


def held(net: Any, x: Tensor) -> Tensor:
    call = net.a
    method = net.b.__call__
    return method(functools.partial(call)(x))


def mapped(net: Any, x: Tensor) -> Tensor:
    return torch.stack(list(map(net.a, x.unbind()))).relu()


def repeated(net: Any, x: Tensor) -> Tensor:
    return net.a(net.b(net.a(x)) * 2)


def checkpointed(net: Any, x: Tensor) -> Tensor:
    return checkpoint(
        net.b, checkpoint(net.a.__call__, x, use_reentrant=False), use_reentrant=False
    )


def without_gradients(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = net.a(x)
    return net.b(x)


def called_functionally(net: Any, x: Tensor) -> Tensor:
    weights = {name: value * 2 for name, value in net.a.named_parameters()}
    return net.b(functional_call(net.a, weights, (x,)))


def by_keyword(net: Any, x: Tensor) -> Tensor:
    return net.b(input=net.a(input=x))


WAYS: list[Callable[[Any, Tensor], Tensor]] = [
    *(directly, dunder, call_impl, forward_alone, held, mapped, repeated, checkpointed),
    *(without_gradients, called_functionally, by_keyword),
]


class Net(nn.Module):
    def __init__(self, way: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def agrees(module: nn.Module, x: Tensor, **names: str) -> dict[str, Any]:
    """Rows of a compiled model against those of eager hooks, also of the gradients."""
    calls = [lambda net: net(x), lambda net: net(x * 2)]
    expected = record_calls(module, calls).expected(METRICS)
    module.zero_grad()
    compiled = torch.compile(module, backend="aot_eager")
    model = tmm.instrument(compiled, tmm.Spec(tmm.activation(*METRICS)))
    with tmm.monitor(model).step(0):
        run_calls(model, calls)
    found = tmm.monitor(model).get_step_metrics()
    assert_agrees(found, expected, tolerance("aot_eager"))
    tmm.remove(model)
    return found


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_any_way_to_call_a_module(way: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    agrees(Net(way), torch.randn(4, 6))


def patched() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    net[0].forward = lambda x, own=net[0].forward: own(x) * 3  # type: ignore[method-assign]
    return net


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[1].register_forward_hook(lambda module, inputs, output: output * 5)
    net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] - 1,))
    return net


def traced_already() -> nn.Module:
    inner = nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    return nn.Sequential(torch.fx.symbolic_trace(inner), nn.Linear(6, 6))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "several": Several,
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 6), Given()), Given()),
    "overriding": lambda: nn.Sequential(Overriding(6, 6), nn.ReLU()),
    "static": lambda: nn.Sequential(nn.Linear(6, 6), Static()),
    "patched": patched,
    "hooked": hooked,
    "traced_already": traced_already,
    "recurrent": lambda: nn.GRU(6, 6, batch_first=True),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True),
}


@pytest.mark.parametrize("name", MODULES)
def test_any_module(name: str) -> None:
    torch.manual_seed(0)
    agrees(MODULES[name](), torch.randn(3, 4, 6))


def test_which_are_marked_without_hooks() -> None:
    linear, several = nn.Linear(2, 2), Several()
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
    others = [Overriding(2, 2), Static(), patched()[0], graph, *graph.children()]  # type: ignore[index]
    assert markable_without_hooks([linear, several, *others]) == {linear, several}


def test_dynamo_is_left_as_it_was() -> None:
    from torch._dynamo.variables import functions, nn_module

    owners = (nn_module.UnspecializedNNModuleVariable, functions.UserMethodVariable)
    before = [*(owner.call_function for owner in owners), nn_module.record_nn_module_stack]
    model = tmm.instrument(
        torch.compile(Net(directly), backend="aot_eager"), tmm.Spec(tmm.activation("rms"))
    )

    def look(net: Any, x: Tensor) -> Tensor:
        raise ArithmeticError("in the middle of a trace")

    with tmm.monitor(model).step(0):
        model(torch.randn(2, 6))
    model._orig_mod.way = look
    with pytest.raises(Exception, match="in the middle"), tmm.monitor(model).step(1):
        model(torch.randn(2, 6))
    after = [*(owner.call_function for owner in owners), nn_module.record_nn_module_stack]
    assert after == before
