"""Rows of many tensors, or of pairs of them, of any dtypes: on a CPU, and by plain operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tmm.kernels.build import DTYPES
from tmm.kernels.dense import flatten, real
from tmm.kernels.summarize.differences import Pairs, flatten_pair
from tmm.kernels.summarize.host import summarize_on_host
from tmm.kernels.summarize.torch_rows import summarize_with_torch


def summarize_group_on_host(
    tensors: Sequence[torch.Tensor], columns: tuple[str, ...]
) -> torch.Tensor | None:
    """The rows of ``summarize_group``, of tensors on the CPU; None where there is no kernel."""
    return _by_dtype([_readable(tensor) for tensor in tensors], columns)


def summarize_group_with_torch(
    tensors: Sequence[torch.Tensor], columns: tuple[str, ...]
) -> torch.Tensor:
    """The rows of ``summarize_group``, tensor by tensor, on any device."""
    return torch.stack([summarize_with_torch(_readable(tensor), columns) for tensor in tensors])


def summarize_pairs_on_host(pairs: Pairs, columns: tuple[str, ...]) -> torch.Tensor | None:
    """The rows of ``summarize_pairs``, of pairs on the CPU.

    None where its kernel cannot read all of them pair by pair, and where there is none.
    """
    if not all(_can_be_read_together(own, other) for own, other in pairs):
        return None
    flat = [flatten_pair(own, other) for own, other in pairs]
    return _by_dtype([own for own, _ in flat], columns, [other for _, other in flat])


def _can_be_read_together(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the kernel knows both: it reads one dtype."""
    is_known = own.dtype == other.dtype and own.dtype in DTYPES and own.shape == other.shape
    return is_known and own.is_cpu and other.is_cpu


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """One that lies densely, is real and of a dtype that kernels know, in any shape."""
    if tensor.is_contiguous() and tensor.dtype in DTYPES:
        return tensor  # as most are
    tensor = real(tensor.detach())
    return flatten(tensor if tensor.dtype in DTYPES else tensor.float())


def _by_dtype(
    tensors: list[torch.Tensor],
    columns: tuple[str, ...],
    subtracted: list[torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """The rows of tensors of any of the kernels' dtypes; None where there is no kernel."""
    members: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        members.setdefault(tensor.dtype, []).append(index)
    if len(members) == 1:
        return summarize_on_host(tensors, columns, subtracted)
    rows = torch.empty(len(tensors), len(columns), dtype=torch.float64, device="cpu")
    for indices in members.values():
        others = None if subtracted is None else [subtracted[index] for index in indices]
        of_dtype = summarize_on_host([tensors[index] for index in indices], columns, others)
        if of_dtype is None:
            return None
        rows[indices] = of_dtype
    return rows
