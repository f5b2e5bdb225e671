"""Gradients that ranks average to measure them, where an optimizer does it in its own step."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist

from tmm.core.torch_private import device_of_collectives
from tmm.spec.ranks import Ranks, is_distributed

_WORD = (1 << 62) - 1


class GradientAverage:
    """Averages copies of gradients over all ranks, if that ``is_wanted`` and nothing else does.

    All ranks ask together, for gradients of the same parameters; what is distributed is left as it
    is.
    """

    def __init__(self, ranks: Ranks, *, is_wanted: bool) -> None:
        self._size = ranks.size
        self._is_needed = is_wanted and ranks.size > 1 and not ranks.averages

    def of(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The averages, in float32 at least.

        Raises:
            RuntimeError: if ranks have gradients of different parameters.
        """
        if not self._is_needed or not gradients:
            return dict(gradients)
        plain = {name: g for name, g in gradients.items() if not is_distributed(g)}
        self._check(plain)
        averages = dict(gradients)
        for name, gradient in plain.items():
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            copy = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
            copy = copy.to(dtype, copy=True, memory_format=torch.contiguous_format)
            dist.all_reduce(copy)
            averages[name] = copy.div_(self._size)
        return averages

    def _check(self, gradients: Mapping[str, torch.Tensor]) -> None:
        """See that all ranks have the same before anything waits for what does not come."""
        named = ";".join(f"{name} {tuple(g.shape)}" for name, g in gradients.items())
        number = int.from_bytes(hashlib.blake2b(named.encode(), digest_size=8).digest(), "big")
        number &= _WORD
        ends = torch.tensor([number, -number], device=device_of_collectives())
        dist.all_reduce(ends, op=dist.ReduceOp.MAX)
        largest, least = ends.tolist()
        if largest != -least:
            raise RuntimeError(
                "average_gradients=True: ranks have gradients of different parameters, or step"
                " different optimizers; leave it out, and the rows are those of rank 0"
            )
