"""Trains the GPT with its monitoring on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

import tmm
from tmm.examples.gpt import GPT, GPTConfig, next_token_loss
from tmm.examples.text import VOCABULARY, batches, documentation_text, encode, split

_VALIDATION_BATCHES = 8


@dataclass(frozen=True)
class TrainingSettings:
    """How to train. ``run`` is the folder to record into, ``every`` as in ``tmm.Spec``."""

    run: Path
    steps: int = 200
    every: int = 10
    backend: str = "inductor"
    seed: int = 0
    device: str = "cpu"
    batch_size: int = 16
    learning_rate: float = 1e-3
    model: GPTConfig = field(default_factory=lambda: GPTConfig(VOCABULARY, layers=3, dropout=0.1))


@dataclass(frozen=True)
class StepReport:
    """One training step; ``loss`` in nats per token."""

    step: int
    loss: float
    seconds: float
    monitored: bool


def token_norm(activation: Tensor) -> Tensor:
    """The L2 norm of each token's vector: a metric of one's own."""
    norm: Tensor = activation.norm(dim=-1)
    return norm


def demo_spec(every: int) -> tmm.Spec:
    """What the demo measures."""
    return tmm.Spec(
        tmm.activation("rms", "absmax", "kurtosis", "zero_fraction"),
        tmm.activation(l2=token_norm, modules=r".*\.(attn|mlp)$"),
        exclude=r".*drop",
        every=every,
    )


def train(settings: TrainingSettings, report: Callable[[StepReport], None]) -> float:
    """Train a new GPT, call ``report`` after each step, and return the loss on held-back text.

    The loss of monitored steps is in the run under the key ``loss``.
    """
    torch.manual_seed(settings.seed)
    corpus = split(encode(documentation_text()))
    module = GPT(settings.model).to(settings.device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=settings.learning_rate)
    model = tmm.instrument(
        torch.compile(module, backend=settings.backend), demo_spec(settings.every), settings.run
    )
    monitor = tmm.monitor(model)
    training = _passages(corpus.training, settings, settings.steps)
    try:
        for step, (inputs, targets) in enumerate(training):
            start = time.perf_counter()
            with monitor.step(step) as monitored:
                logits = model(inputs.to(settings.device))
                loss = next_token_loss(logits, targets.to(settings.device))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                monitor.log_scalar("loss", loss)
            value = loss.item()
            report(StepReport(step, value, time.perf_counter() - start, monitored))
    finally:
        tmm.remove(model)
    return _validation_loss(module, corpus.validation, settings)


def _passages(
    tokens: Tensor, settings: TrainingSettings, count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(settings.seed)
    size, length = settings.batch_size, settings.model.context
    return islice(batches(tokens, batch_size=size, length=length, generator=generator), count)


def _validation_loss(module: GPT, tokens: Tensor, settings: TrainingSettings) -> float:
    module.eval()
    losses = []
    with torch.no_grad():
        for inputs, targets in _passages(tokens, settings, _VALIDATION_BATCHES):
            logits = module(inputs.to(settings.device))
            losses.append(next_token_loss(logits, targets.to(settings.device)))
    return torch.stack(losses).mean().item()
