"""A small GPT with the module names that nanoGPT made usual."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class GPTConfig:
    """The sizes of a ``GPT``.

    ``width`` is that of the residual stream and a multiple of ``heads``; ``dropout`` applies to
    the embeddings, the attention weights and what each branch adds to the stream; ``tie_weights``
    lets the token embedding and ``lm_head`` share one parameter.
    """

    vocabulary: int = 256
    context: int = 128
    layers: int = 4
    heads: int = 4
    width: int = 128
    dropout: float = 0.0
    bias: bool = True
    tie_weights: bool = False

    def __post_init__(self) -> None:
        for name in ("vocabulary", "context", "layers", "heads", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not a multiple of heads={self.heads}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} does not lie in [0, 1)")


class Attention(nn.Module):
    """Causal self-attention with several heads; keeps the shape (batch, length, width)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.width, 3 * config.width, bias=config.bias)
        self.c_proj = nn.Linear(config.width, config.width, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, stream: Tensor) -> Tensor:
        """Mix the positions of ``stream``, each with those before it."""
        projected: Tensor = self.c_attn(stream)
        heads = projected.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind()
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        output: Tensor = self.resid_dropout(self.c_proj(mixed.transpose(1, 2).flatten(2)))
        return output


class MLP(nn.Module):
    """Two linear layers, four times as wide in between; keeps the shape."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.width, config.width, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, stream: Tensor) -> Tensor:
        """Transform each position of ``stream`` by itself."""
        output: Tensor = self.dropout(self.c_proj(self.gelu(self.c_fc(stream))))
        return output


class Block(nn.Module):
    """One layer: attention and MLP, each normalised before and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, stream: Tensor) -> Tensor:
        """Add what both branches contribute to ``stream``."""
        stream = stream + self.attn(self.ln_1(stream))
        mixed: Tensor = stream + self.mlp(self.ln_2(stream))
        return mixed


class GPT(nn.Module):
    """A decoder-only transformer that predicts the next token at each position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocabulary, config.width)
        self.wpe = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width, bias=config.bias)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        self._initialise()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position.

        Args:
            tokens: integers of shape (batch, length), length at most ``config.context``.

        Returns:
            Logits of shape (batch, length, vocabulary).

        Raises:
            ValueError: if ``tokens`` is longer than the context.
        """
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"{length} tokens are longer than context={self.config.context}")
        positions = torch.arange(length, device=tokens.device)
        stream: Tensor = self.drop(self.wte(tokens) + self.wpe(positions))
        for block in self.h:
            stream = block(stream)
        logits: Tensor = self.lm_head(self.ln_f(stream))
        return logits

    def _initialise(self) -> None:
        # Each layer adds twice to the stream, whose variance would grow with depth otherwise.
        branch_std = 0.02 / math.sqrt(2 * self.config.layers)
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                std = branch_std if name.endswith("c_proj") else 0.02
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of (batch, length, vocabulary) against (batch, length)."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
