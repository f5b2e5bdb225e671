"""A small decoder in the manner of large ones: rotary positions, grouped keys, gates, experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import (
    all_to_all_single,
    all_to_all_single_autograd,
    wait_tensor,
)
from torch.distributed.tensor import DTensor
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """How large a decoder is; with ``experts`` its last block has these in place of one network.

    With ``is_plain`` attention is written out, and knows no positions.
    """

    vocabulary: int = 32
    width: int = 16
    heads: int = 4
    key_heads: int = 2
    hidden: int = 32
    blocks: int = 2
    length: int = 8
    experts: int = 0
    is_plain: bool = False

    @property
    def channels(self) -> int:
        return self.width // self.heads


def rotate(x: Tensor, frequencies: Tensor) -> Tensor:
    """Rotary positions of a tensor of shape (batch, length, heads, channels)."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    turned = pairs * frequencies[: x.shape[1]].view(1, x.shape[1], 1, -1)
    return torch.view_as_real(turned).flatten(3).type_as(x)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        channels = shape.channels
        self.wq = nn.Linear(shape.width, shape.heads * channels, bias=False)
        self.wk = nn.Linear(shape.width, shape.key_heads * channels, bias=False)
        self.wv = nn.Linear(shape.width, shape.key_heads * channels, bias=False)
        self.wo = nn.Linear(shape.heads * channels, shape.width, bias=False)

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        batch, length, _ = x.shape
        channels, groups = self.shape.channels, self.shape.heads // self.shape.key_heads
        query, key, value = (
            layer(x).view(batch, length, -1, channels) for layer in (self.wq, self.wk, self.wv)
        )
        if not self.shape.is_plain:
            query, key = rotate(query, frequencies), rotate(key, frequencies)
        key, value = (
            one[:, :, :, None, :].expand(-1, -1, -1, groups, -1).flatten(2, 3)
            for one in (key, value)
        )
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        if self.shape.is_plain:
            weights = (query @ key.transpose(-2, -1) / channels**0.5).softmax(-1)
            heads = weights @ value
        else:
            heads = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        result: Tensor = self.wo(heads.transpose(1, 2).flatten(2))
        return result


class FeedForward(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.width, shape.hidden, bias=False)
        self.w2 = nn.Linear(shape.hidden, shape.width, bias=False)
        self.w3 = nn.Linear(shape.width, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.w2(functional.silu(self.w1(x)) * self.w3(x))
        return result


class Experts(nn.Module):
    """Those of this rank, one after the other; tokens come sorted by expert."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(shape.experts, shape.width, shape.hidden) * 0.2)
        self.w2 = nn.Parameter(torch.randn(shape.experts, shape.hidden, shape.width) * 0.2)

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        w1, w2 = (local(weight) for weight in (self.w1, self.w2))
        ends = counts.cumsum(0).tolist()
        parts = []
        for expert, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            hidden = functional.silu(tokens[begin:end] @ w1[expert])
            parts.append(hidden @ w2[expert])
        return torch.cat(parts)


class MixtureOfExperts(nn.Module):
    """Each token goes to the expert that its router prefers, on whichever rank that is.

    ``group`` are the ranks among which experts are split; None for one process.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.router = nn.Linear(shape.width, shape.experts, bias=False)
        self.experts = Experts(shape)
        self.count = shape.experts
        self.group: Any = None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).max(-1)
        order = chosen.argsort(stable=True)
        counts = chosen.bincount(minlength=self.count)
        result = self._run(tokens[order], counts)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return (result[back] * weights[:, None]).view_as(x)

    def _run(self, tokens: Tensor, counts: Tensor) -> Tensor:
        if self.group is None:
            result: Tensor = self.experts(tokens, counts)
            return result
        size = dist.get_world_size(self.group)
        theirs = wait_tensor(all_to_all_single(counts, None, None, self.group)).view(size, -1)
        sent = counts.view(size, -1).sum(1).tolist()
        taken = theirs.sum(1).tolist()
        received = all_to_all_single_autograd(tokens, taken, sent, self.group)
        # From (rank, expert) to (expert, rank), and back.
        expert = torch.arange(theirs.shape[1]).repeat(size).repeat_interleave(theirs.flatten())
        order = expert.argsort(stable=True)
        made = self.experts(received[order], theirs.sum(0))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        return all_to_all_single_autograd(made[back].contiguous(), sent, taken, self.group)


class Block(nn.Module):
    def __init__(self, shape: Shape, *, has_experts: bool) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.attention = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.width, eps=1e-5)
        if has_experts:
            self.moe = MixtureOfExperts(shape)
        else:
            self.feed_forward = FeedForward(shape)
        self.has_experts = has_experts

    def forward(self, x: Tensor, frequencies: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), frequencies)
        network = self.moe if self.has_experts else self.feed_forward
        result: Tensor = x + network(self.ffn_norm(x))
        return result


class Decoder(nn.Module):
    """With ``skips_head`` it gives back hidden states, and the loss calls the head."""

    frequencies: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleDict(
            {
                str(place): Block(
                    shape, has_experts=bool(shape.experts) and place == shape.blocks - 1
                )
                for place in range(shape.blocks)
            }
        )
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.output = nn.Linear(shape.width, shape.vocabulary, bias=False)
        angles = torch.outer(
            torch.arange(2.0 * shape.length),
            1.0 / 100.0 ** (torch.arange(0, shape.channels, 2) / shape.channels),
        )
        self.register_buffer("frequencies", torch.polar(torch.ones_like(angles), angles))
        self.skips_head = False

    def forward(self, tokens: Tensor) -> Tensor:
        # torch 2.13 cannot go back from AOTAutograd into a DTensor that a graph is given as it is.
        hidden = self.tok_embeddings(tokens).clone()
        for block in self.layers.values():
            hidden = block(hidden, self.frequencies)
        hidden = self.norm(hidden)
        return hidden if self.skips_head else self.output(hidden)


def decoder(shape: Shape) -> Decoder:
    torch.manual_seed(0)
    return Decoder(shape)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
