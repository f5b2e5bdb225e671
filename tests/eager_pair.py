"""A model and its reference, monitored and run by plain eager forwards, call by call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import tmm

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Base(nn.Module):
    """Two layers and state of several kinds; subclasses say what is done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("mean", torch.zeros(8))
        self.plain = torch.zeros(8, dtype=torch.float64)


def model_of(forward: Callable[..., Any]) -> nn.Module:
    """A model whose ``forward`` is that function."""
    torch.manual_seed(0)
    return type("Model", (Base,), {"forward": forward})().double()


def changed(module: nn.Module, amount: float = 0.5) -> None:
    """Train a bit."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += amount * torch.randn(parameter.shape, generator=generator).double()


@dataclass
class Pair:
    """A monitored model, and what it was before it was changed."""

    module: nn.Module
    model: Any
    start: nn.Module

    @classmethod
    def of(
        cls,
        module: nn.Module,
        *,
        compiled: bool,
        change: bool = True,
        backend: str = "aot_eager",
    ) -> Pair:
        """Instrument a module, with itself as the reference, and train it a bit."""
        torch._dynamo.reset()
        start = copy.deepcopy(module)
        model = torch.compile(module, backend=backend) if compiled else module
        spec = tmm.Spec(tmm.activation_difference("norm"), tmm.rcc(), reference="init")
        pair = cls(module, tmm.instrument(model, spec), start)
        if change:
            changed(module)
        return pair

    def step(self, index: int, passes: int = 1) -> tuple[dict[str, float], dict[str, float]]:
        """The norms of differences of one step, monitored and by eager forwards.

        Modules that the two eager forwards call in different ways have no norm.
        """
        outputs: list[dict[str, list[torch.Tensor]]] = [{}, {}]
        for which, module in enumerate(copy.deepcopy((self.module, self.start))):
            for name, part in module.named_modules():
                part.register_forward_hook(
                    lambda _, __, output, name=name, into=outputs[which]: into.setdefault(
                        name or "[root module]", []
                    ).append(output.detach().clone())
                )
            with torch.compiler.set_stance("force_eager"):
                for number in range(passes):
                    torch.manual_seed(number)
                    module(X)
        monitor = tmm.monitor(self.model)
        with monitor.step(index):
            for number in range(passes):
                torch.manual_seed(number)
                self.model(X)
        got = {
            key.split("/")[1]: value
            for key, value in monitor.get_step_metrics().items()
            if key.startswith("activation_difference/")
        }
        want = {}
        for name, own in outputs[0].items():
            other = outputs[1].get(name, [])
            if [x.shape for x in own] == [x.shape for x in other]:
                differences = [(x - y).flatten() for x, y in zip(own, other, strict=True)]
                want[name] = torch.cat(differences).norm().item()
        return got, want

    @property
    def reasons(self) -> dict[str, str]:
        """Why sites are not compared."""
        known = tmm.explain(self.model).unmeasured.items()
        return {name.removesuffix(", compared with the reference"): text for name, text in known}
