"""What an attention in a graph was computed from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

import torch
from torch.fx import Node

from tmm.passes.graph.values import value_of

FORBIDDING = -9999.0
"""What a mask makes of the logit of a hidden key, at most: models write -inf, finfo.min, -10000."""

_BEYOND_BIASES = -1e8  # no bias that is added to it shows the key again

MaskKind: TypeAlias = Literal["added", "allowed", "forbidden"]
"""What a mask means: added to the logits, or a boolean that is true where a key may be seen or not.
"""


@dataclass(frozen=True)
class Mask:
    """One of the masks of an attention.

    ``has_joined_heads`` tells that batch and heads are one dimension of it. A boolean mask replaces
    the logits of what it forbids by ``value``, which is what the softmax gets, scaled.
    """

    tensor: Node
    kind: MaskKind
    has_joined_heads: bool = False
    value: float = -math.inf

    @property
    def hides(self) -> bool:
        """Whether no key that it forbids is seen, unless something is added to the logits."""
        return self.kind == "added" or self.value <= FORBIDDING

    @staticmethod
    def of(tensor: Node) -> Mask:
        """What ``scaled_dot_product_attention`` makes of a mask."""
        is_boolean = value_of(tensor).dtype == torch.bool
        return Mask(tensor, "allowed" if is_boolean else "added")


def hide_by_themselves(masks: Sequence[Mask]) -> bool:
    """Whether what boolean masks forbid is hidden, whatever the others add; in their order."""
    for place, mask in enumerate(masks):
        is_added_to = any(later.kind == "added" for later in masks[place + 1 :])
        if not mask.hides:
            return False
        if mask.kind != "added" and is_added_to and mask.value > _BEYOND_BIASES:
            return False
    return True


class Scores(Protocol):
    """What is made of logits in a way that no mask can express."""

    def apply(
        self,
        logits: torch.Tensor,
        indices: Sequence[torch.Tensor],
        tensors: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """A block of logits as the softmax gets it, -inf where a key may not be seen.

        ``logits`` has shape (batch, heads, queries, keys), of which ``indices`` are the places.
        """


@dataclass(frozen=True)
class FoundAttention:
    """An attention in a graph.

    ``caller`` is the node whose module called it; after ``position`` all of its tensors are known.
    ``key`` is of shape (..., keys, channels), or with the last two the other way round. ``heads``
    is the number of heads where tensors have batch and heads in one dimension. ``scores`` is what
    is made of the scaled logits, with further ``tensors``.
    """

    caller: Node
    position: Node
    query: Node
    key: Node
    value: Node
    output: Node | None
    masks: tuple[Mask, ...] = ()
    is_causal: bool = False
    scale: float | None = None
    key_is_turned: bool = False
    heads: int | None = None
    scores: Scores | None = None
    tensors: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Unmatched:
    """What looks like an attention, and why its statistics are not known.

    ``is_numbered`` tells that it counts among the attentions that its module calls.
    """

    caller: Node
    reason: str
    is_numbered: bool = True
