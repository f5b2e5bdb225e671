"""Which nodes of a graph hold partials of a tensor instead of its row."""

from __future__ import annotations

from torch.fx import Node

from tmm.kernels.fused.row_partials import FusedRow

_FUSED = "tmm_fused"


def fused_of(node: Node) -> FusedRow | None:
    """What the partials become that a node computes; None for one that computes no partials."""
    row: FusedRow | None = node.meta.get(_FUSED)
    return row


def set_fused(node: Node, row: FusedRow | None) -> None:
    """Remember what the partials become that a node computes."""
    node.meta[_FUSED] = row
