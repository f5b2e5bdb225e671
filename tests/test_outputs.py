"""Paths of tensors inside outputs, and outputs that are no ordinary tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import tmm
from tmm.twin.outputs import tensors_in


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
