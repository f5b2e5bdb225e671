"""A reference is what it was when it was made, whatever the model's tensors become."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tmm
from tests.eager_pair import Pair, X, changed, model_of
from tmm.core.failures import MonitoringWarning

BOTH = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "not compiled"])


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def merge_in_place(module: nn.Module) -> None:
    changed(module)


def load(module: nn.Module) -> None:
    other = copy.deepcopy(module)
    changed(other)
    module.load_state_dict(other.state_dict())


def load_by_assigning(module: nn.Module) -> None:
    other = copy.deepcopy(module)
    changed(other)
    module.load_state_dict(other.state_dict(), assign=True)


def write_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.mul_(1.5)


def write_by_numpy(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.detach().numpy()[...] *= 1.5


def replace(module: nn.Module) -> None:
    module[0].weight = nn.Parameter(module[0].weight.detach() * 1.5)


CHANGES = (merge_in_place, load, load_by_assigning, write_data, write_by_numpy, replace)
SOURCES = ("init", "set_reference", "state dict", "module")


def sources_and_changes() -> list[Any]:
    """By default every change of one source, and two changes of every source."""
    parameters = []
    for source in SOURCES:
        for change in CHANGES:
            quick = source == "init" or change in (merge_in_place, write_by_numpy)
            marks = () if quick else (pytest.mark.slow,)
            parameters.append(pytest.param(source, change, marks=marks))
    return parameters


@pytest.mark.parametrize(("source", "change"), sources_and_changes())
def test_frozen_parameters_are_those_of_the_beginning(
    source: str, change: Callable[[nn.Module], None]
) -> None:
    module = two_layers().requires_grad_(False)
    start = copy.deepcopy(module)
    reference: Any = {"state dict": module.state_dict(), "module": module}.get(source, "init")
    rules = tmm.activation_difference("norm"), tmm.parameter_difference("norm"), tmm.rcc()
    model = tmm.instrument(module, tmm.Spec(*rules, reference=reference))
    monitor = tmm.monitor(model)
    if source == "set_reference":
        monitor.set_reference(module.state_dict())
    change(module)
    with monitor.step(0):
        model(X)
        monitor.monitor_parameters()
    got = monitor.get_step_metrics()
    difference = module[0](X) - start[0](X)
    for key, want in (
        ("activation_difference/0/norm", difference.norm()),
        ("activation_difference/[root module]/norm", (module(X) - start(X)).norm()),
        ("parameter_difference/0.weight/norm", (module[0].weight - start[0].weight).norm()),
        ("RCC (W_t-W_0)x_t/0/l2norm", difference.norm(dim=-1).mean()),
    ):
        assert got[key] == pytest.approx(want.item(), rel=1e-9), key


def test_a_module_or_a_file_that_changes_later_is_compared_as_it_was(tmp_path: Path) -> None:
    module, reference = two_layers(), two_layers()
    changed(reference)
    was = copy.deepcopy(reference)
    torch.save(reference.state_dict(), tmp_path / "state.pt")
    mapped = torch.load(tmp_path / "state.pt", mmap=True)
    for source in (reference, reference.state_dict(), mapped):
        spec = tmm.Spec(tmm.activation_difference("norm"), reference=source)
        model = tmm.instrument(copy.deepcopy(module), spec)
        tensors = list(source.values() if isinstance(source, dict) else source.parameters())
        with torch.no_grad():
            for tensor in tensors:
                tensor += 1
        with tmm.monitor(model).step(0):
            y = model(X)
        got = tmm.monitor(model).get_step_metrics()["activation_difference/[root module]/norm"]
        assert got == pytest.approx((y - was(X)).norm().item(), rel=1e-9)
        with torch.no_grad():
            for tensor in tensors:
                tensor -= 1


def test_a_parameter_of_another_shape_is_named() -> None:
    module = two_layers()
    model = tmm.instrument(module, tmm.Spec(tmm.parameter_difference("norm"), reference="init"))
    module[0] = nn.Linear(8, 5).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with tmm.monitor(model).step(0):
            tmm.monitor(model).monitor_parameters()
    assert "parameter_difference/2.weight/norm" in tmm.monitor(model).get_step_metrics()
    assert "parameter_difference/0.weight/norm" not in tmm.monitor(model).get_step_metrics()
    reason = tmm.explain(model).unmeasured["0.weight, compared with the reference"]
    assert reason == "0.weight has shape (5, 8), in the reference (8, 8)"


def assigned(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    self.mean = 0.5 * self.mean + y.detach().mean(0)
    return self.b(y - self.mean)


def assigned_before_a_break(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    self.register_buffer("mean", 0.5 * self.mean + y.detach().mean(0))
    torch._dynamo.graph_break()
    return self.b(y - self.mean)


def plain_attribute(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    self.plain = 0.5 * self.plain + y.detach().mean(0)
    return self.b(y - self.plain)


def in_place_before_a_break(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    self.mean.mul_(0.5).add_(y.detach().mean(0))
    torch._dynamo.graph_break()
    return self.b(y - self.mean)


def in_place_in_a_view(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    self.mean[0].add_(y.detach().mean())
    return self.b(y - self.mean)


def in_place_between_graphs(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    torch._dynamo.graph_break()
    print(end="")
    self.mean.data.add_(y.detach().mean(0))
    torch._dynamo.graph_break()
    return self.b(y - self.mean)


def activation_in_place_in_a_later_graph(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    part = y[:2]
    torch._dynamo.graph_break()
    y.add_(self.scale)
    torch._dynamo.graph_break()
    return self.b(y + part.sum(0))


@BOTH
@pytest.mark.parametrize(
    "forward",
    [
        assigned,
        assigned_before_a_break,
        plain_attribute,
        in_place_before_a_break,
        in_place_in_a_view,
        in_place_between_graphs,
        activation_in_place_in_a_later_graph,
    ],
)
def test_state_that_a_forward_pass_changes_is_the_references_own(
    forward: Callable[..., Any], compiled: bool
) -> None:
    """Each forward pass of the reference begins with the state that it was given."""
    pair = Pair.of(model_of(forward), compiled=compiled)
    for index in range(2):
        got, want = pair.step(index)
        assert got == pytest.approx(want, rel=1e-9)
        for _ in range(2):
            pair.model(X)  # an unmonitored step changes the model's state alone
    assert not pair.reasons


def kept_activation(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.a(x)
    if hasattr(self, "last"):
        y = y + self.last
    self.last = y.detach()
    return self.b(y)


def kept_constant(self: Any, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(self, "mask"):
        self.mask = torch.linspace(0, 1, 8, dtype=torch.float64)
    return self.b(self.a(x) * self.mask)


def square(size: int) -> nn.Module:
    return nn.Linear(size, size)


@BOTH
def test_tensors_that_appear_later_are_compared_only_if_they_are_constants(compiled: bool) -> None:
    pair = Pair.of(model_of(kept_constant), compiled=compiled)
    for index in range(3):
        got, want = pair.step(index)
        assert got == pytest.approx(want, rel=1e-9)
    pair = Pair.of(model_of(kept_activation), compiled=compiled)
    got, want = pair.step(0)
    assert got == pytest.approx(want, rel=1e-9)
    with pytest.warns(MonitoringWarning, match="cannot be compared with the reference"):
        got, _ = pair.step(1)
    assert not got
    assert pair.reasons["b"] == "the model has last, which the reference does not have"


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [
        *[(nn.LayerNorm, True), (square, False)],
        pytest.param(nn.LayerNorm, False, marks=pytest.mark.slow),
        pytest.param(square, True, marks=pytest.mark.slow),
    ],
)
def test_modules_and_parameters_made_in_forward_are_shared(kind: Any, compiled: bool) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = kind(8).double()(self.a(x))
        return self.b(y * nn.Parameter(torch.full((8,), 2.0, dtype=torch.float64)))

    pair = Pair.of(model_of(forward), compiled=compiled)
    got, want = pair.step(0)
    assert got.keys() == {"a", "b", "[root module]"}
    assert got == pytest.approx({name: want[name] for name in got}, rel=1e-9)
    assert not pair.reasons


def test_a_parameter_of_another_model_is_named() -> None:
    outside = nn.Parameter(torch.ones(8, dtype=torch.float64))
    pair = Pair.of(model_of(lambda self, x: self.b(self.middle(self.a(x)))), compiled=False)
    type(pair.module).middle = torch.compiler.disable(lambda self, y: y * outside)
    with pytest.warns(MonitoringWarning):
        got, want = pair.step(0)
    assert got == pytest.approx({"a": want["a"]}, rel=1e-9)
    assert pair.reasons.keys() == {"b", "b.weight", "[root module]"}
