"""What an attention in a graph was computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch.fx import Node

from tmm.passes.flexible_scores import FlexibleScores

MaskKind: TypeAlias = Literal["added", "allowed", "forbidden"]
"""What a mask means: added to the logits, or a boolean that is true where a key may be seen or not.
"""


@dataclass(frozen=True)
class Mask:
    """One of the masks of an attention.

    ``has_joined_heads`` tells that batch and heads are one dimension of it.
    """

    tensor: Node
    kind: MaskKind
    has_joined_heads: bool = False

    @staticmethod
    def of(tensor: Node) -> Mask:
        """What ``scaled_dot_product_attention`` makes of a mask."""
        is_boolean = tensor.meta["example_value"].dtype == torch.bool
        return Mask(tensor, "allowed" if is_boolean else "added")


@dataclass(frozen=True)
class FoundAttention:
    """An attention in a graph.

    ``caller`` is the node whose module called it; after ``position`` all of its tensors are known.
    ``key`` is of shape (..., keys, channels), or with the last two the other way round. ``heads``
    is the number of heads where tensors have batch and heads in one dimension. ``scores`` is what
    ``flex_attention`` makes of the logits, with further ``tensors``.
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
    scores: FlexibleScores | None = None
    tensors: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Unmatched:
    """What looks like an attention, and why its statistics are not known."""

    caller: Node
    reason: str
