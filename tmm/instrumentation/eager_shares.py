"""What a rank has of a tensor outside of every graph, where ranks share tensors."""

from __future__ import annotations

import torch

from tmm.core.records import Share
from tmm.passes.graph.placed_edges import placed_edge
from tmm.spec.ranks import TensorParallel

_NOTHING_TELLS = Share(
    "unknown", "it was measured outside of graphs, and nothing tells how ranks share it"
)


def share_outside(tensor: torch.Tensor, shared: TensorParallel, *, of_gradient: bool) -> Share:
    """What this rank has of a tensor, or of its gradient, as far as autograd tells."""
    edge = placed_edge(tensor)
    placed = edge.gradient if of_gradient else edge.tensor
    return (
        _NOTHING_TELLS if placed is None else placed.share(shared.ranks, is_first=shared.is_first)
    )


def share_of_rows_outside(tensor: torch.Tensor, shared: TensorParallel) -> Share:
    """What this rank has of the norms of the rows, the last dimension, of a tensor."""
    share = share_outside(tensor, shared, of_gradient=False)
    placed = placed_edge(tensor).tensor
    return share if placed is None else placed.share_of_rows(tensor.dim(), share)
