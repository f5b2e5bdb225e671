"""Small models, each with a task that it learns in a few dozen steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 4
FEATURES, SIDE, LENGTH, VOCABULARY = 16, 8, 16, 24
Batch = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Self-attention, whose scale and whose first key a fault can change."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.sharpness: Tensor
        self.sink: Tensor
        self.register_buffer("sharpness", torch.ones(()))
        self.register_buffer("sink", torch.zeros(()))

    def forward(self, stream: Tensor) -> Tensor:
        """Mix the positions of ``stream``, shape (batch, length, width)."""
        q, k, v = self.qkv(stream).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        length = stream.shape[1]
        mask = torch.zeros(length, length)
        if self.causal:
            mask = mask.masked_fill(torch.ones_like(mask).triu(1).bool(), -1e9)
        mask = mask + self.sink * (torch.arange(length) == 0)
        q = q * self.sharpness
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return output


class Block(nn.Module):
    """Attention and an MLP, each behind a normalisation and added to the stream."""

    def __init__(self, width: int, heads: int, *, causal: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Attention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            *(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
            nn.Dropout(dropout),
        )

    def forward(self, stream: Tensor) -> Tensor:
        """Keep the shape."""
        stream = stream + self.attn(self.norm1(stream))
        mixed: Tensor = stream + self.mlp(self.norm2(stream))
        return mixed


class GPT(nn.Module):
    """Predicts the next token."""

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(
            Block(width, 2, causal=True, dropout=dropout) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.05)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of shape (batch, length, vocabulary)."""
        stream: Tensor = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream))
        return logits


class ViT(nn.Module):
    """Classifies images of 8 x 8 by their 16 patches."""

    def __init__(self, width: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.ModuleList(
            Block(width, 2, causal=False, dropout=dropout) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        stream: Tensor = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            stream = block(stream)
        logits: Tensor = self.head(self.norm(stream).mean(1))
        return logits


class Recurrent(nn.Module):
    """Classifies sequences by the last state of a GRU; held out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed, self.gru = nn.Linear(4, width), nn.GRU(width, width, batch_first=True)
        self.hidden, self.act = nn.Linear(width, width), nn.ReLU()
        self.out = nn.Linear(width, CLASSES)

    def forward(self, sequence: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        states, _ = self.gru(self.embed(sequence))
        logits: Tensor = self.out(self.act(self.hidden(states[:, -1])))
        return logits


class Mixer(nn.Module):
    """An MLP-Mixer of 16 patches; held out."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 2, stride=2)
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            for _ in range(layers)
        )
        self.channels = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width),
                nn.Linear(width, 2 * width),
                nn.GELU(),
                nn.Linear(2 * width, width),
            )
            for _ in range(layers)
        )
        self.final, self.classify = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, classes)."""
        stream: Tensor = self.stem(images).flatten(2).transpose(1, 2)
        for tokens, channels in zip(self.tokens, self.channels, strict=True):
            stream = stream + tokens(stream.transpose(1, 2)).transpose(1, 2)
            stream = stream + channels(stream)
        logits: Tensor = self.classify(self.final(stream).mean(1))
        return logits


@dataclass
class Task:
    """A model with what it is trained on.

    ``first`` to ``last`` name a layer near the input, one in the middle and the last one;
    ``activation`` is the module behind ``middle``, ``norms`` and ``attentions`` the names of such.
    """

    name: str
    model: nn.Module
    batch: Callable[[torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    first: str
    middle: str
    activation: str
    last: str
    lr: float = 3e-3
    norms: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    has_float_inputs: bool = True
    blocks: tuple[str, ...] = field(default=())


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


def _vectors(seed: int, size: int = 32) -> Callable[[torch.Generator], Batch]:
    centres = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(1000 + seed))

    def batch(generator: torch.Generator) -> Batch:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        return centres[labels] + 0.7 * torch.randn(size, FEATURES, generator=generator), labels

    return batch


def _images(seed: int, size: int = 16) -> Callable[[torch.Generator], Batch]:
    generator = torch.Generator().manual_seed(2000 + seed)
    templates = torch.randn(CLASSES, 1, SIDE, SIDE, generator=generator)

    def batch(generator: torch.Generator) -> Batch:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        noise = torch.randn(size, 1, SIDE, SIDE, generator=generator)
        return templates[labels] + 0.7 * noise, labels

    return batch


def _tokens(seed: int, size: int = 16) -> Callable[[torch.Generator], Batch]:
    generator = torch.Generator().manual_seed(3000 + seed)
    following = torch.randperm(VOCABULARY, generator=generator)

    def batch(generator: torch.Generator) -> Batch:
        tokens = [torch.randint(VOCABULARY, (size,), generator=generator)]
        for _ in range(LENGTH):
            other = torch.randint(VOCABULARY, (size,), generator=generator)
            is_noise = torch.rand(size, generator=generator) < 0.1
            tokens.append(torch.where(is_noise, other, following[tokens[-1]]))
        sequence = torch.stack(tokens, 1)
        return sequence[:, :-1], sequence[:, 1:]

    return batch


def _sequences(seed: int, size: int = 32) -> Callable[[torch.Generator], Batch]:
    generator = torch.Generator().manual_seed(4000 + seed)
    templates = torch.randn(CLASSES, 8, 4, generator=generator)

    def batch(generator: torch.Generator) -> Batch:
        labels = torch.randint(CLASSES, (size,), generator=generator)
        return templates[labels] + 0.5 * torch.randn(size, 8, 4, generator=generator), labels

    return batch


def mlp(seed: int, width: int = 32, dropout: float = 0.0, act: type[nn.Module] = nn.ReLU) -> Task:
    """Four linear layers, with ReLUs by default."""
    layers: list[nn.Module] = []
    for inputs in (FEATURES, width, width):
        layers += [nn.Linear(inputs, width), act()]
    if dropout:
        layers.append(nn.Dropout(dropout))
    model = nn.Sequential(*layers, nn.Linear(width, CLASSES))
    last = str(len(model) - 1)
    return Task("mlp", model, _vectors(seed), _loss, "0", "2", "3", last, blocks=("0", "2", "4"))


def cnn(seed: int, width: int = 8, dropout: float = 0.0, act: type[nn.Module] = nn.ReLU) -> Task:
    """Three convolutions with batch normalisation."""
    layers: list[nn.Module] = []
    for inputs in (1, width, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), act()]
    layers += [nn.AvgPool2d(2), nn.Flatten(), nn.Dropout(dropout)]
    model = nn.Sequential(*layers, nn.Linear(16 * width, CLASSES))
    return Task(
        *("cnn", model, _images(seed), _loss, "0", "3", "5", "12"),
        norms=("1", "4", "7"),
        blocks=("2", "5", "8"),
    )


def gpt(seed: int, width: int = 32, dropout: float = 0.0, layers: int = 2) -> Task:
    """A causal transformer on sequences of tokens."""
    names = [f"blocks.{place}" for place in range(layers)]
    return Task(
        *("gpt", GPT(width, layers, dropout), _tokens(seed), _loss),
        *("blocks.0.mlp.0", "blocks.1.mlp.0", "blocks.1.mlp.1", "head"),
        norms=(*(f"{name}.norm{i}" for name in names for i in (1, 2)), "norm"),
        attentions=tuple(f"{name}.attn" for name in names),
        has_float_inputs=False,
        blocks=tuple(names),
    )


def vit(seed: int, width: int = 32, dropout: float = 0.0, layers: int = 2) -> Task:
    """A transformer on patches of images."""
    names = [f"blocks.{place}" for place in range(layers)]
    return Task(
        *("vit", ViT(width, layers, dropout), _images(seed), _loss),
        *("patches", "blocks.1.mlp.0", "blocks.1.mlp.1", "head"),
        norms=(*(f"{name}.norm{i}" for name in names for i in (1, 2)), "norm"),
        attentions=tuple(f"{name}.attn" for name in names),
        blocks=tuple(names),
    )


def rnn(seed: int, width: int = 24) -> Task:
    """A recurrent network; held out."""
    return Task(
        *("rnn", Recurrent(width), _sequences(seed), _loss, "embed", "hidden", "act", "out"),
        blocks=("embed", "hidden"),
    )


def mixer(seed: int, width: int = 24, layers: int = 3) -> Task:
    """An MLP-Mixer; held out."""
    norms = [f"{kind}.{place}.0" for place in range(layers) for kind in ("tokens", "channels")]
    return Task(
        *("mixer", Mixer(width, layers), _images(seed), _loss),
        *("stem", "channels.1.1", "channels.1.2", "classify"),
        norms=(*norms, "final"),
        blocks=("channels.0", "channels.1"),
    )


MODELS: dict[str, Callable[..., Task]] = {"mlp": mlp, "cnn": cnn, "gpt": gpt, "vit": vit}
HELD_OUT: dict[str, Callable[..., Task]] = {"rnn": rnn, "mixer": mixer}
