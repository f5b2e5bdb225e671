"""Reductions of tensors that no graph holds."""

from __future__ import annotations

import torch

from tmm.core.metrics import COLUMN_SEPARATOR, Reduction
from tmm.core.rng import RandomState
from tmm.kernels.ops import histogram, summarize
from tmm.kernels.own_results import result_tensor
from tmm.kernels.pairs import reduce_pair


def reduce_eagerly(tensor: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """What a graph would hand out for ``reduction`` of ``tensor``: a row, or a whole tensor."""
    tensor = tensor.detach()
    tensor = tensor.values() if tensor.is_nested else tensor
    if reduction.function is None:
        if reduction.is_histogram:
            return histogram(tensor)
        return summarize(tensor, COLUMN_SEPARATOR.join(reduction.columns))
    values = tensor.clone()  # the function may change its argument in place
    return apply_function(reduction, values) if reduction.trace else values


def reduce_pair_eagerly(
    own: torch.Tensor, reference: torch.Tensor, reduction: Reduction
) -> torch.Tensor:
    """``reduce_pair``; a function may change its arguments in place, and is named."""
    if reduction.function is None:
        return reduce_pair(own, reference, reduction)
    return apply_function(reduction, own.clone(), reference.clone())


class FunctionCalls:
    """Calls a function of a user for one site over and over, and learns what it leaves alone.

    To keep the states of NumPy's and Python's random numbers takes longer than most functions do.
    One that has not drawn any in its first calls for a site is taken not to.
    """

    def __init__(self) -> None:
        self._left_to_try = 3

    def apply(self, reduction: Reduction, tensor: torch.Tensor) -> torch.Tensor:
        """``apply_function``."""
        self._state = RandomState.capture(of_torch_only=not self._left_to_try)
        return apply_function(reduction, tensor, state=self)

    def restore(self) -> None:
        """Give the training its random numbers back."""
        if self._left_to_try > 0:
            drawn = self._state.has_drawn_elsewhere()
            self._left_to_try = -1 if drawn else self._left_to_try - 1
        self._state.restore()


def apply_function(
    reduction: Reduction,
    *tensors: torch.Tensor,
    state: RandomState | FunctionCalls | None = None,
) -> torch.Tensor:
    """The row, or all the values, of a user's function of a tensor, or of one and its counterpart.

    ``state`` gives random numbers back afterwards. Raises ``RuntimeError``, which names the metric,
    for a function that fails.
    """
    assert reduction.function is not None
    state = state or RandomState.capture()
    try:
        with torch.no_grad():
            result = result_tensor(reduction.function(*tensors))
    except Exception as error:
        raise RuntimeError(
            f"the metric {reduction.metrics[0]!r} failed on a tensor of shape"
            f" {tuple(tensors[0].shape)} ({tensors[0].dtype}): {error}"
        ) from error
    finally:
        state.restore()  # the training's random numbers are not the metric's
    if reduction.collects_values:
        return result.reshape(-1)
    return summarize(result, COLUMN_SEPARATOR.join(reduction.columns))
