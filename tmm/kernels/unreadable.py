"""Which tensors the reductions cannot read, and why."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tmm.core.torch_private import is_batched


def why_unmeasurable(tensor: torch.Tensor) -> str | None:
    """Why an output has no rows, in a few words; None for one that has.

    Of a nested tensor with jagged layout the values are measured, where they are its elements.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"{str(tensor.dtype).removeprefix('torch.')} output"
    return why_unreadable(tensor)


def why_unreadable(tensor: torch.Tensor) -> str | None:
    """Why the elements of a tensor of any dtype cannot be reduced; None if they can."""
    if is_batched(tensor):
        return "inside torch.func.vmap"
    if tensor.layout not in (torch.strided, torch.jagged) or (
        tensor.is_nested and tensor.layout is torch.strided
    ):
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"{kind} output"
    if tensor.layout is torch.jagged and _has_holes(tensor):
        return "nested output with holes, whose values hold more than its elements"
    return None


def _has_holes(jagged: torch.Tensor) -> bool:
    """Whether rows are shorter than the pieces of its values, as those of a narrowed tensor."""
    lengths: Callable[[], torch.Tensor | None] = jagged.lengths  # type: ignore[attr-defined]
    return lengths() is not None
