"""Reductions of tensors that no graph holds."""

from __future__ import annotations

import torch

from tmm.metrics import Reduction
from tmm.operators import COLUMN_SEPARATOR, histogram, summarize
from tmm.preserve import RandomState


def reduce_eagerly(tensor: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """What a graph would hand out for ``reduction`` of ``tensor``: a row, or a whole tensor."""
    tensor = tensor.detach()
    tensor = tensor.values() if tensor.is_nested else tensor
    if reduction.function is None:
        if reduction.is_histogram:
            return histogram(tensor)
        return summarize(tensor, COLUMN_SEPARATOR.join(reduction.columns))
    values = tensor.clone()  # the function may change its argument in place
    return apply_function(values, reduction) if reduction.trace else values


def apply_function(tensor: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """The row, or all the values, of a user's function of ``tensor``."""
    assert reduction.function is not None
    state = None if reduction.trace else RandomState.capture()
    try:
        with torch.no_grad():
            result = reduction.function(tensor)
    except Exception as error:
        raise RuntimeError(
            f"the metric {reduction.metrics[0]!r} failed on a tensor of shape"
            f" {tuple(tensor.shape)} ({tensor.dtype}): {error}"
        ) from error
    finally:
        if state is not None:
            state.restore()  # the training's random numbers are not the metric's
    if not isinstance(result, torch.Tensor):
        result = torch.tensor(result, dtype=torch.float64)
    if reduction.collects_values:
        return result.reshape(-1)
    return summarize(result, COLUMN_SEPARATOR.join(reduction.columns))
