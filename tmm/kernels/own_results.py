"""What a user's metric function gave, as a tensor that can be measured."""

from __future__ import annotations

from numbers import Real

import numpy as np
import torch

from tmm.kernels.dense import packed_dtype


class ResultError(TypeError):
    """A user's metric function gave something that is not measured."""


def result_tensor(result: object, near: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor of a result; a number is one of float64, or of float32 where a device has no more.

    In a graph a number is made ``near`` a tensor: any other would be taken for one from outside.
    Raises ``ResultError`` for what is neither a number nor a tensor, or is complex, and
    ``TypeError`` for a number that a traced tensor holds.
    """
    if isinstance(result, torch.Tensor):
        if result.is_complex():
            raise ResultError("it gave complex numbers; give their abs() or their real part")
        return result if result.layout is torch.strided else result.to_dense()
    if isinstance(result, (torch.SymInt, torch.SymFloat)) and not result.node.has_hint():
        raise TypeError("it gave a number that is not known before the graph has run")
    if isinstance(result, (Real, torch.SymInt, torch.SymFloat, np.bool_)):
        if near is not None:
            wide = packed_dtype(near.device)
            return near.new_full((), result, dtype=wide)  # type: ignore[arg-type]
        return torch.as_tensor(result, dtype=torch.float64, device="cpu")
    if isinstance(result, np.ndarray) and result.dtype.kind in "biuf":
        return torch.as_tensor(result, dtype=torch.float64, device="cpu")
    raise ResultError(f"it gave {result!r}, which is neither a number nor a tensor")
