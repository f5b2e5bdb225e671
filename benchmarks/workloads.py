"""Training steps that the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import tmm
from tmm.examples.gpt import GPT, GPTConfig

FIVE_METRICS = ("mean", "std", "rms", "absmax", "zero_fraction")


@dataclass(frozen=True)
class Workload:
    """A GPT and the batches it is trained on, all from one seed."""

    name: str
    config: GPTConfig
    batch: int
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def model(self) -> GPT:
        """The same model each time."""
        torch.manual_seed(0)
        return GPT(self.config).to(self.device, self.dtype)

    def tokens(self) -> torch.Tensor:
        """Random tokens; shape (batch, context)."""
        generator = torch.Generator().manual_seed(1)
        shape = (self.batch, self.config.context)
        return torch.randint(self.config.vocabulary, shape, generator=generator).to(self.device)


GPT_SMALL = Workload(
    "GPT, 4 layers, width 256, float32, batch 4 x 256",
    GPTConfig(vocabulary=256, context=256, layers=4, heads=8, width=256),
    batch=4,
)
GPT_124M = Workload(
    "GPT-2 124M, bfloat16, batch 8 x 1024",
    GPTConfig(vocabulary=50304, context=1024, layers=12, heads=12, width=768, tie_weights=True),
    batch=8,
    device="cuda",
    dtype=torch.bfloat16,
)
GPT_TOY = Workload(
    "GPT, 1 layer, width 16: only shows that everything runs",
    GPTConfig(vocabulary=32, context=16, layers=1, heads=2, width=16),
    batch=2,
)


def usual_workload(*, toy: bool = False) -> Workload:
    """The GPT that most questions are asked of on this machine."""
    if toy:
        return GPT_TOY
    return GPT_124M if torch.cuda.is_available() else GPT_SMALL


def monitored_step(model: nn.Module, step: Callable[[], None]) -> Callable[[], None]:
    """``step`` as a monitored step of ``model``, its values read."""
    monitor = tmm.monitor(model)

    def run() -> None:
        with monitor.step((monitor.current_step or 0) + 1):
            step()
        monitor.get_step_metrics()

    return run


def next_token_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each token from the logits at the one before."""
    return nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(), tokens[:, 1:].reshape(-1)
    )


def training_step(
    module: nn.Module,
    forward: Callable[..., torch.Tensor],
    tokens: torch.Tensor,
    after_backward: Callable[[], None] | None = None,
    *,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = next_token_loss,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], None]:
    """One step of SGD, or of ``optimizer``, by ``forward``, which runs ``module``.

    The input is ``tokens``, and ``loss`` gets the output and the input: by default that of the
    next token.
    """
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=1e-4)

    def step() -> None:
        loss(forward(tokens), tokens).backward()
        if after_backward is not None:
            after_backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
