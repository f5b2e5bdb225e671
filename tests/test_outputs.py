"""Paths of tensors inside outputs, and outputs that are no ordinary tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tmm
from tmm.instrumentation.outputs import tensors_in


class Pair(NamedTuple):
    left: torch.Tensor
    right: object


@dataclass
class Output:
    logits: torch.Tensor
    hidden: object = None


def test_paths() -> None:
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    assert tensors_in(a) == [("", a)]
    nested = {"z": (b, [c, None, 3]), 1: Pair(a, "text"), "o": Output(b, {"h": c})}
    paths = {path: tensor.numel() for path, tensor in tensors_in((a, nested))}
    assert paths == {
        "[0]": 1,
        "[1][z][0]": 2,
        "[1][z][1][0]": 3,
        "[1][1][0]": 1,
        "[1][o][logits]": 2,
        "[1][o][hidden][h]": 3,
    }
    assert tensors_in(None) == tensors_in("text") == tensors_in(Output) == []


class Odd:
    """An object that says no more than its type."""

    def __repr__(self) -> str:
        return "Odd"


@pytest.mark.parametrize(
    ("output", "paths"),
    [
        ({0: 1.0, "0": 2.0}, ["[0]", "['0']"]),
        ({"0": 1.0, 0: 2.0, "1": 3.0}, ["['0']", "[0]", "[1]"]),
        ({None: 1.0, "None": 2.0}, ["[None]", "['None']"]),
        ({1.5: 1.0, "1.5": 2.0}, ["[1.5]", "['1.5']"]),
        ({(1, 2): 1.0, "(1, 2)": 2.0}, ["[(1, 2)]", "['(1, 2)']"]),
        ({"a][b": 1.0, "a": {"b": 2.0}}, ["['a][b']", "['a']['b']"]),
        ([{0: {"x": 1.0}, "0": {"x": 2.0}}], ["[0][0]['x']", "[0]['0']['x']"]),
        ({0: 1.0, "0": 2.0, "'0'": 3.0}, ["[0]", "['0']", "[\"'0'\"]"]),
        ({"a/b": 1.0, "a": {"/b": 2.0}, "a.b": 3.0}, ["[a/b]", "[a][/b]", "[a.b]"]),
        ({Odd(): 1.0, Odd(): 2.0}, ["[Odd]", "[Odd] (2)"]),
    ],
)
def test_paths_of_different_tensors_differ(output: Any, paths: list[str]) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items()}
        if isinstance(value, list):
            return [filled(item) for item in value]
        return torch.full((2,), value)

    found = {path: float(tensor[0]) for path, tensor in tensors_in(filled(output))}
    assert list(found) == paths
    assert sorted(found.values()) == list(map(float, range(1, len(paths) + 1)))


@pytest.mark.parametrize("compiled", [True, False])
def test_tensors_under_the_keys_0_and_text_0_have_rows_of_their_own(compiled: bool) -> None:
    module = Calls(lambda _, x: {0: x, "0": x * 2, "other": x * 3})
    callee = torch.compile(module, backend="eager") if compiled else torch.compiler.disable(module)
    model = tmm.instrument(callee, tmm.Spec(tmm.activation("mean")))
    with tmm.monitor(model).step(0):
        model(torch.ones(3, 4))
    assert tmm.monitor(model).get_step_metrics() == {
        "activation/[root module][0]/mean": 1,
        "activation/[root module]['0']/mean": 2,
        "activation/[root module][other]/mean": 3,
    }


class Calls(nn.Module):
    """A layer and what is done with it."""

    def __init__(self, call: Callable[[nn.Module, torch.Tensor], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.call = call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.fc, x)


def in_vmap(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(fc)(x) * 2


def in_cond(fc: nn.Module, x: torch.Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: fc(x), lambda x: x * 2, (x,))


def in_grad(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gradient: torch.Tensor = torch.func.grad(lambda x: fc(x).square().sum())(x)
    return gradient


def to_sparse(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = fc(x)
    return output.to_sparse()


def jagged(fc: nn.Module, x: torch.Tensor) -> torch.Tensor:
    output: torch.Tensor = fc(torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged))
    return output.values()


class Same(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Ragged(nn.Module):
    """Works on sequences of different lengths; ``how`` they go through its layers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.linear, self.norm, self.gelu = nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU()
        self.how = how

    def layers(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.gelu(self.norm(self.linear(x)))
        return output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "checkpointed":
            return checkpoint(self.layers, x, use_reentrant=False)  # type: ignore[no-any-return]
        y = self.layers(x)
        if self.how == "called twice":
            y = self.layers(y)
        if self.how == "overwritten":
            y = y.mul_(2)
        return y if self.how == "returned" else y.transpose(1, 2)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize(
    "how", ["returned", "transposed", "checkpointed", "called twice", "overwritten"]
)
@pytest.mark.filterwarnings("ignore")
def test_gradients_of_jagged_tensors(how: str, backend: str | None) -> None:
    torch._dynamo.reset()
    net = Ragged(how)
    spec = tmm.Spec(tmm.activation_gradient("norm", "histogram", largest=lambda g: g.abs().amax()))
    callee = net if backend is None else torch.compile(net, backend=backend)
    model = tmm.instrument(callee, spec)
    monitor = tmm.monitor(model)
    for step, lengths in enumerate([(3, 1, 4), (2, 5)]):
        given = [torch.randn(length, 8) for length in lengths]
        jagged = torch.nested.nested_tensor(given, layout=torch.jagged)
        with monitor.step(step):
            model(jagged).values().square().sum().backward()
        got = monitor.get_step_metrics()
        gradients: dict[str, list[torch.Tensor]] = {}
        y = torch.cat(given)
        for _ in range(1 + (how == "called twice")):
            for name in ("linear", "norm", "gelu"):
                y = getattr(net, name)(y)
                y.register_hook(gradients.setdefault(name, []).append)
        (y * (2 if how == "overwritten" else 1)).square().sum().backward()
        for name, found in gradients.items():
            all_of_it = torch.cat(found)
            key = f"activation_gradient/{name}"
            assert got[f"{key}/norm"] == pytest.approx(float(all_of_it.norm()), rel=1e-5)
            assert got[f"{key}/histogram"].sum() == all_of_it.numel()
            largest = sum(float(g.abs().amax()) for g in found) / len(found)
            assert got[f"{key}/largest"] == pytest.approx(largest, rel=1e-5)
    assert tmm.explain(model).unmeasured == {}


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("how", ["returned", "transposed", "checkpointed"])
@pytest.mark.filterwarnings("ignore")
def test_jagged_tensors_are_compared_with_a_reference(how: str, backend: str | None) -> None:
    """In graphs; between them a warning says that they are not followed."""
    torch._dynamo.reset()
    net = Ragged(how)
    first = copy.deepcopy(net)
    spec = tmm.Spec(
        tmm.activation_difference("norm", "cosine", least=lambda a, b: (a - b).abs().amin()),
        tmm.rcc(modules="linear"),
        reference="init",
    )
    callee = net if backend is None else torch.compile(net, backend=backend)
    model = tmm.instrument(callee, spec)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    given = [torch.randn(length, 8) for length in (3, 1, 4)]
    with tmm.monitor(model).step(0):
        model(torch.nested.nested_tensor(given, layout=torch.jagged)).values().sum().backward()
    got = tmm.monitor(model).get_step_metrics()
    x = y = torch.cat(given)
    own = first.linear.weight
    changed = (x @ (net.linear.weight - own).T + net.linear.bias - first.linear.bias).norm(dim=-1)
    key = "RCC (W_t-W_0)x_t/linear/l2norm"
    assert got[key] == pytest.approx(float(changed.mean()), rel=1e-4)
    for name in ("linear", "norm", "gelu"):
        x, y = getattr(net, name)(x), getattr(first, name)(y)
        key = f"activation_difference/{name}"
        assert got[f"{key}/norm"] == pytest.approx(float((x - y).norm()), rel=1e-4)
        assert got[f"{key}/least"] == pytest.approx(float((x - y).abs().amin()), abs=1e-5)
        cosine = torch.cosine_similarity(x.flatten(), y.flatten(), dim=0)
        assert got[f"{key}/cosine"] == pytest.approx(float(cosine), rel=1e-4)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("made", ["narrowed", "of lengths"])
@pytest.mark.filterwarnings("ignore")
def test_jagged_tensors_with_holes_are_named(made: str, backend: str | None) -> None:
    """What lies between their rows is none of theirs."""
    torch._dynamo.reset()
    net, starts, lengths = Same(), torch.tensor([0, 2]), torch.tensor([1, 3])
    x = torch.randn(2, 6, 4)
    if made == "narrowed":
        given = torch.nested.narrow(x, 1, starts, lengths, layout=torch.jagged)
    else:
        offsets = torch.tensor([0, 2, 6])
        given = torch.nested.nested_tensor_from_jagged(x[0], offsets, lengths=lengths)
    model = tmm.instrument(
        net if backend is None else torch.compile(net, backend=backend),
        tmm.Spec(tmm.activation("norm"), diagnosis=True),
    )
    with tmm.monitor(model).step(0):
        model(given)
    found = tmm.monitor(model).get_step_metrics()
    assert not [key for key in found if key.startswith(("activation", "model_input"))]
    assert "holes" in tmm.explain(model).unmeasured["[root module]"]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("call", "unmeasured"),
    [
        (in_vmap, {"fc": "inside torch.func.vmap"}),
        (in_cond, {"fc": "inside cond"}),
        (in_grad, {}),
        (to_sparse, {"[root module]": "sparse_coo output"}),
        (jagged, {}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_unusual_outputs_are_measured_or_named(
    call: Callable[[nn.Module, torch.Tensor], Any], unmeasured: dict[str, str], backend: str
) -> None:
    torch._dynamo.reset()
    module = Calls(call)
    model = tmm.instrument(torch.compile(module, backend=backend), tmm.Spec(tmm.activation("norm")))
    monitor = tmm.monitor(model)
    x = torch.randn(3, 4)
    with monitor.step(0):
        output = model(x)
    expected = {}
    if "fc" not in unmeasured:
        rows = torch.cat([x, x[:1]]) if call is jagged else x
        expected["activation/fc/norm"] = float(module.fc(rows).norm())
    if "[root module]" not in unmeasured:
        expected["activation/[root module]/norm"] = float(output.detach().norm())
    assert monitor.get_step_metrics() == pytest.approx(expected, rel=1e-6)
    assert tmm.explain(model).unmeasured == unmeasured


class Rotary(nn.Module):
    """Turns pairs of numbers, as complex ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        angles = torch.arange(pairs.shape[-1], device=x.device, dtype=x.dtype)
        return pairs * torch.polar(torch.ones_like(angles), angles)


class Spectrum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(x)


class Complex(nn.Module):
    """Holds a module whose output is complex, between two whose outputs are real."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(8, 8), middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = self.middle(self.first(x))
        tmm.record("spectrum", middle)
        return middle.abs() if x.dim() == 2 else middle


@pytest.mark.parametrize("lowering", ["fused", "operator"])
@pytest.mark.parametrize("kind", [Rotary, Spectrum])
@pytest.mark.parametrize("shape", [(4, 8), (2, 3, 8)])
def test_complex_outputs_under_inductor(
    kind: type[nn.Module], shape: tuple[int, ...], lowering: Any
) -> None:
    net, x = Complex(kind()), torch.randn(shape)
    spec = tmm.Spec(tmm.activation("rms", "absmax", "histogram"), tmm.activation_gradient("rms"))
    model = tmm.instrument(torch.compile(net), spec, lowering=lowering)
    monitor = tmm.monitor(model)
    with monitor.step(0):
        model(x).abs().sum().backward()
    found = monitor.get_step_metrics()
    seen = net.middle(net.first(x)).abs()
    rms = seen.square().mean().sqrt().item()
    for name in ("middle", "[root module]"):
        assert found[f"activation/{name}/rms"] == pytest.approx(rms, rel=1e-4)
        assert found[f"activation/{name}/absmax"] == pytest.approx(seen.max().item(), rel=1e-4)
        assert np.sum(found[f"activation/{name}/histogram"]) == seen.numel()
    assert found["spectrum"] == pytest.approx(seen.mean().item(), rel=1e-4)
    assert found["activation_gradient/middle/rms"] == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("kind", [Rotary, Spectrum])
def test_complex_outputs_against_a_reference_under_inductor(kind: type[nn.Module]) -> None:
    net, x = Complex(kind()), torch.randn(4, 8)
    before = net.middle(net.first(x))
    spec = tmm.Spec(tmm.activation_difference("norm"), reference="init")
    model = tmm.instrument(torch.compile(net), spec)
    monitor = tmm.monitor(model)
    with torch.no_grad():
        net.first.weight.mul_(1.5)
    with monitor.step(0):
        model(x).sum().backward()
    norm = (net.middle(net.first(x)) - before).abs().norm().item()
    found = monitor.get_step_metrics()
    assert found["activation_difference/middle/norm"] == pytest.approx(norm, rel=1e-4)
