"""Rows of partial sums of a tensor and its counterpart in a reference."""

from __future__ import annotations

import torch

from tmm.metrics import PAIR_COLUMNS, Reduction
from tmm.operators import COLUMN_SEPARATOR, histogram, summarize


def reduce_pair(own: torch.Tensor, reference: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """The row, or all values, of ``reduction`` of a tensor and its counterpart.

    Built-in metrics are of the difference ``own - reference``, taken in float32 at least; a
    function gets both tensors. Works eagerly and while a graph is traced.
    """
    if reduction.function is not None:
        result = torch.as_tensor(reduction.function(own, reference))
        return result.reshape(-1) if reduction.collects_values else _row(result, reduction.columns)
    own, reference = widened(own, reference)
    difference = own - reference
    if reduction.is_histogram:
        return histogram(difference)
    if reduction.is_row_norm:
        return row_norms(difference, reduction)
    plain = tuple(column for column in reduction.columns if column not in PAIR_COLUMNS)
    parts = [_row(difference, plain)]
    # In the order of PAIR_COLUMNS.
    if "reference_sum_squares" in reduction.columns:
        parts.append(_row(reference, ("sum_squares",)))
    if "own_sum_squares" in reduction.columns:
        parts.append(_row(own, ("sum_squares",)))
    if "dot" in reduction.columns:
        parts.append(_row(inner_products(own, reference), ("sum",)))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def widened(own: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both in float32 at least: a difference in half precision would lose its digits."""
    wide = torch.promote_types(own.dtype, torch.float32)
    return own.to(wide), reference.to(wide)


def inner_products(own: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """The products of the elements; of complex ones the real part of the inner product."""
    return (own * reference.conj()).real if own.is_complex() else own * reference


def row_norms(tensor: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """The row of the 2-norms of the rows, the last dimension, of ``tensor``."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms = torch.linalg.vector_norm(tensor.to(dtype), dim=-1)
    return _row(norms, reduction.columns)


def _row(tensor: torch.Tensor, columns: tuple[str, ...]) -> torch.Tensor:
    return summarize(tensor, COLUMN_SEPARATOR.join(columns))
