"""The models and sizes that parts are about, on a device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.architectures import VisionTransformer, mlp, resnet
from benchmarks.workloads import GPT_124M, GPT_TOY, Workload
from tmm.examples.gpt import GPT, GPTConfig


@dataclass(frozen=True)
class Subject:
    """Where a part runs: a device, for some seconds; with ``toy`` on small sizes."""

    device: str
    seconds: float = 60.0
    toy: bool = False

    def workload(self) -> Workload:
        """The GPT that costs are measured on."""
        if self.toy:
            return replace(GPT_TOY, device=self.device)
        return replace(GPT_124M, device=self.device)

    @property
    def options(self) -> dict[str, Any]:
        """How models are compiled: as usual, or without a compiler where it is only to be shown."""
        return {"backend": "aot_eager"} if self.toy and not self.is_gpu else {}

    @property
    def is_gpu(self) -> bool:
        """Whether the device is one of those that are asked about."""
        return torch.device(self.device).type == "cuda"


@dataclass(frozen=True)
class ZooModel:
    """A model that is compared with eager hooks: how it is made, and what it is called with."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], torch.Tensor]
    dtype: torch.dtype = torch.float32

    def on(self, device: str) -> tuple[nn.Module, torch.Tensor]:
        """Model and inputs there, the same each time."""
        torch.manual_seed(0)
        module, inputs = self.make().to(device, self.dtype), self.inputs().to(device)
        return module, inputs.to(self.dtype) if inputs.is_floating_point() else inputs


def zoo(*, toy: bool) -> list[ZooModel]:
    """A few models of different kinds, the ones that tell most first; ``toy`` takes two."""
    scale = 1 if toy else 4
    config = GPTConfig(
        vocabulary=64 * scale, context=16 * scale, layers=2, heads=2, width=16 * scale
    )

    def tokens() -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(config.vocabulary, (4, config.context), generator=generator)

    def noise(*shape: int) -> Callable[[], torch.Tensor]:
        return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(1))

    found = [
        ZooModel("GPT, float32", lambda: GPT(config), tokens),
        ZooModel("GPT, bfloat16", lambda: GPT(config), tokens, torch.bfloat16),
        ZooModel("ResNet, float32", lambda: resnet(4 * scale), noise(4, 3, 16, 16)),
        ZooModel("MLP, float16", lambda: mlp(24 * scale, 3), noise(8, 24 * scale), torch.float16),
        ZooModel(
            "vision transformer, float32",
            lambda: VisionTransformer(16 * scale, 2, 16),
            noise(4, 3, 16, 16),
        ),
        ZooModel("MLP, float64", lambda: mlp(16 * scale, 2), noise(8, 16 * scale), torch.float64),
    ]
    return found[:1] + found[-1:] if toy else found
