"""Logits with masks that do not hide what they forbid for certain: computed as the program does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tmm.passes.attention.found import MaskKind


@dataclass(frozen=True)
class FilledMask:
    """What one mask does to the scaled logits; see ``Mask``.

    With ``heads``, its first dimension is batch and heads, of that number.
    """

    kind: MaskKind
    value: float
    heads: int | None = None


@dataclass(frozen=True)
class FilledScores:
    """Masks in the order in which the program applies them.

    A key is hidden where all of them together make ``hidden_up_to`` or less of its logit; every
    other logit is what the program's softmax gets, also where a mask has replaced it.
    """

    masks: tuple[FilledMask, ...]
    hidden_up_to: float

    def apply(
        self,
        logits: torch.Tensor,
        indices: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """A block of logits as the softmax gets it, -inf where a key is hidden.

        ``logits`` has shape (batch, heads, queries, keys), of which ``indices`` are the places; the
        masks' ``tensors`` can be broadcast to all logits.
        """
        shift = torch.zeros_like(logits)
        for mask, tensor in zip(self.masks, tensors, strict=True):
            apart = tensor if mask.heads is None else tensor.unflatten(0, (-1, mask.heads))
            block = _block(apart, indices)
            if mask.kind == "added":
                logits, shift = logits + block, shift + block
            else:
                is_replaced = block if mask.kind == "forbidden" else ~block
                logits = logits.masked_fill(is_replaced, mask.value)
                shift = shift.masked_fill(is_replaced, mask.value)
        return logits.masked_fill(shift <= self.hidden_up_to, float("-inf"))


def _block(tensor: torch.Tensor, indices: Sequence[torch.Tensor]) -> torch.Tensor:
    """The elements of a mask at some places of the logits."""
    tensor = tensor.reshape(*[1] * (len(indices) - tensor.dim()), *tensor.shape)
    # A dimension of one element is the same everywhere.
    places = [i if size != 1 else i * 0 for i, size in zip(indices, tensor.shape, strict=True)]
    block: torch.Tensor = tensor[tuple(places)]
    return block
