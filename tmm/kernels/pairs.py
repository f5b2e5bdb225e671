"""Rows of partial sums of a tensor and its counterpart in a reference."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tmm.core.metrics import COLUMN_SEPARATOR, Reduction
from tmm.kernels.dense import packed_dtype
from tmm.kernels.ops import histogram, summarize, summarize_difference
from tmm.kernels.own_results import result_tensor
from tmm.kernels.summarize.differences import difference

ROW_NORM = Reduction(("l2norm",), ("count", "sum"))
"""The mean of the 2-norms over the last dimension, as torch-module-monitor writes it."""


def reduce_pair(own: torch.Tensor, reference: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """The row, or all values, of ``reduction`` of a tensor and its counterpart.

    Built-in metrics are of the difference ``own - reference``, taken in float32 at least; a
    function gets both tensors. Works eagerly and while a graph is traced.
    """
    if reduction.function is not None:
        result = result_tensor(reduction.function(own, reference), own)
        return result.reshape(-1) if reduction.collects_values else _row(result, reduction.columns)
    if reduction.is_histogram:
        return histogram(difference(own, reference))
    if reduction.is_row_norm:
        return row_norms(difference(own, reference), reduction)
    return summarize_difference(own, reference, COLUMN_SEPARATOR.join(reduction.columns))


def row_norms(tensor: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """The row of the 2-norms of the rows, the last dimension, of ``tensor``."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms = torch.linalg.vector_norm(tensor.to(dtype), dim=-1)
    assert reduction.columns == ("count", "sum")
    # Plain operations, which a compiler joins with those of the norm.
    wide = packed_dtype(norms.device)
    return torch.stack([norms.new_full((), norms.numel(), dtype=wide), norms.sum(dtype=wide)])


@dataclass(frozen=True)
class Normalization:
    """A layer normalization without its weight and bias."""

    shape: tuple[int, ...]
    eps: float

    def apply(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the weight of the layer is multiplied with."""
        return torch.nn.functional.layer_norm(tensor, self.shape, None, None, self.eps)


def normalized_norms(
    normalization: Normalization, own: torch.Tensor, *reference: torch.Tensor
) -> torch.Tensor:
    """The row of the norms of an input, or of its difference from another one, normalized."""
    own = normalization.apply(own)
    if not reference:
        return row_norms(own, ROW_NORM)
    return reduce_pair(own, normalization.apply(reference[0]), ROW_NORM)


def norms_without(tensor: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
    """The row of the norms of ``tensor``, less a bias if one is given."""
    return row_norms(tensor - bias[0].detach() if bias else tensor, ROW_NORM)


def _row(tensor: torch.Tensor, columns: tuple[str, ...]) -> torch.Tensor:
    return summarize(tensor, COLUMN_SEPARATOR.join(columns))
