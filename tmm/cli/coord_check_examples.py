"""An MLP and a GPT, each in the standard parametrization and in muP, to try the check on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from tmm.examples.gpt import next_token_loss
from tmm.examples.text import VOCABULARY, batches, documentation_text, encode

Parametrization: TypeAlias = Literal["standard", "mup"]
Batches: TypeAlias = list[tuple[Tensor, Tensor]]

BASE_WIDTH = 64
"""At this width both parametrizations have the same learning rates and multipliers."""

_TITLES = {"standard": "standard parametrization", "mup": "muP"}

FEATURES, CLASSES = 32, 10
HEADS, LAYERS, CONTEXT = 4, 2, 32


class MLP(nn.Module):
    """Three ReLU layers without biases and a readout; (batch, FEATURES) to (batch, CLASSES)."""

    def __init__(self, width: int, parametrization: Parametrization) -> None:
        super().__init__()
        self.readout_multiplier = _readout_multiplier(width, parametrization)
        self.input = nn.Linear(FEATURES, width, bias=False)
        self.hidden_1 = nn.Linear(width, width, bias=False)
        self.hidden_2 = nn.Linear(width, width, bias=False)
        self.readout = nn.Linear(width, CLASSES, bias=False)
        _initialise(self, parametrization)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the logits of the classes."""
        stream = functional.relu(self.input(inputs))
        stream = functional.relu(self.hidden_1(stream))
        stream = functional.relu(self.hidden_2(stream))
        logits: Tensor = self.readout(self.readout_multiplier * stream)
        return logits


class Attention(nn.Module):
    """Causal attention of HEADS heads, whose size grows with the width."""

    def __init__(self, width: int, parametrization: Parametrization) -> None:
        super().__init__()
        size, base_size = width // HEADS, BASE_WIDTH // HEADS
        self.scale = base_size**0.5 / size if parametrization == "mup" else size**-0.5
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Mix the positions of ``stream``, each with those before it."""
        query, key, value = (
            layer(stream).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale
        )
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Attention and two linear layers, each normalised before and added to the stream."""

    def __init__(self, width: int, parametrization: Parametrization) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, parametrization)
        self.norm_2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        """Add what both branches contribute to ``stream``."""
        stream = stream + self.attention(self.norm_1(stream))
        mixed: Tensor = stream + self.down(functional.gelu(self.up(self.norm_2(stream))))
        return mixed


class GPT(nn.Module):
    """A transformer of LAYERS blocks; bytes (batch, length) to logits of the next ones."""

    def __init__(self, width: int, parametrization: Parametrization) -> None:
        super().__init__()
        self.readout_multiplier = _readout_multiplier(width, parametrization)
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList(Block(width, parametrization) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, VOCABULARY, bias=False)
        _initialise(self, parametrization)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape (batch, length, VOCABULARY)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        stream: Tensor = self.token(tokens) + self.position(positions)
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.readout(self.readout_multiplier * self.norm(stream))
        return logits


def _readout_multiplier(width: int, parametrization: Parametrization) -> float:
    return BASE_WIDTH / width if parametrization == "mup" else 1.0


def _initialise(model: nn.Module, parametrization: Parametrization) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            # Both are zero in the limit; at finite width random ones only add what shrinks.
            if parametrization == "mup" and name.endswith(("readout", "query")):
                nn.init.zeros_(module.weight)


def adam(
    model: nn.Module, width: int, parametrization: Parametrization, learning_rate: float
) -> torch.optim.Adam:
    """Adam with the learning rates of the parametrization.

    Under muP that of hidden matrices, whose two dimensions both grow with width, falls as
    1/width; the others (input weights, embeddings, gains and biases, the readout behind its
    multiplier) keep theirs (Yang et al. 2022, Tensor Programs V, table 8).
    """
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_hidden = parameter.dim() == 2 and not name.startswith(
            ("input", "token", "position", "readout")
        )
        (hidden if is_hidden else others).append(parameter)
    factor = BASE_WIDTH / width if parametrization == "mup" else 1.0
    groups = [
        {"params": hidden, "lr": learning_rate * factor},
        {"params": others, "lr": learning_rate},
    ]
    # muP's gradients fall as 1/width, and must stay far above epsilon at every width.
    return torch.optim.Adam(groups, eps=1e-12)


@dataclass(frozen=True)
class Example:
    """A model in one parametrization, with all that ``tmm.coord_check`` needs besides widths."""

    name: str
    make_model: Callable[[int], tuple[nn.Module, torch.optim.Optimizer]]
    batches: Callable[[int], Batches]
    loss: Callable[[Tensor, Tensor], Tensor]


def examples() -> Iterator[Example]:
    """The MLP and the GPT, each in both parametrizations."""
    for make in (mlp, gpt):
        yield make("standard")
        yield make("mup")


def mlp(parametrization: Parametrization) -> Example:
    """The MLP on normal inputs that a random linear teacher sorts into classes."""
    return _example(MLP, parametrization, 2**-10, _teacher_batches, functional.cross_entropy)


def gpt(parametrization: Parametrization) -> Example:
    """The GPT on the documentation of Python."""
    return _example(GPT, parametrization, 2**-8, _text_batches, next_token_loss)


def _example(
    kind: type[MLP] | type[GPT],
    parametrization: Parametrization,
    learning_rate: float,
    batches: Callable[[int], Batches],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Example:
    def make_model(width: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = kind(width, parametrization)
        return model, adam(model, width, parametrization, learning_rate)

    return Example(f"{kind.__name__}, {_TITLES[parametrization]}", make_model, batches, loss)


def _teacher_batches(seed: int, count: int = 16, size: int = 128) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(FEATURES, CLASSES, generator=generator)
    inputs = torch.randn(count, size, FEATURES, generator=generator)
    return [(batch, (batch @ teacher).argmax(-1)) for batch in inputs]


def _text_batches(seed: int, count: int = 16) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    passages = batches(
        encode(documentation_text()), batch_size=16, length=CONTEXT, generator=generator
    )
    return list(islice(passages, count))
