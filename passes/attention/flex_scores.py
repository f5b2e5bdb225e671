"""What a user's functions make of the logits in ``flex_attention``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

_INDICES = 4  # of batch, head, query and key


@dataclass(frozen=True, eq=False)
class FlexibleScores:
    """The traced ``score_mod`` and ``mask_mod`` of a call.

    Both get single numbers, the indices of batch, head, query and key, and then tensors from
    outside, ``score_tensors`` and ``mask_tensors`` in number.
    """

    score: GraphModule
    mask: GraphModule
    score_tensors: int
    mask_tensors: int

    def apply(
        self,
        logits: torch.Tensor,
        indices: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """A block of logits as the softmax gets it, -inf where a key may not be seen.

        ``logits`` has shape (batch, heads, queries, keys), of which ``indices`` are the places.
        """
        places = [index.reshape(-1) for index in indices]
        score_tensors, mask_tensors = tensors[: self.score_tensors], tensors[self.score_tensors :]
        scores = _everywhere(self.score, places, len(score_tensors), with_score=True)
        allowed = _everywhere(self.mask, places, len(mask_tensors), with_score=False)
        changed: torch.Tensor = scores(logits, *places, *score_tensors)
        return changed.masked_fill(~allowed(*places, *mask_tensors), float("-inf"))


def _everywhere(
    function: Callable[..., Any], places: Sequence[torch.Tensor], tensors: int, *, with_score: bool
) -> Callable[..., Any]:
    """``function`` of single numbers, for all places of a block at once."""
    scores = (0,) if with_score else ()
    for varying in reversed(range(_INDICES)):
        indices = [0 if index == varying else None for index in range(_INDICES)]
        function = torch.func.vmap(function, in_dims=(*scores, *indices, *(None,) * tensors))
    return function
