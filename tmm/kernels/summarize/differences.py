"""What is measured of a tensor and another one that it is compared with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from tmm.core.metrics import PAIR_COLUMNS
from tmm.kernels.build import DTYPES
from tmm.kernels.dense import flatten, is_dense

Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]

_MOST = 1 << 24  # elements whose differences are written down together: 64 MiB in float32


def difference(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``own - other``, in float32 at least: in half precision it would lose its digits."""
    wide = torch.promote_types(torch.promote_types(own.dtype, other.dtype), torch.float32)
    return own.to(wide) - other.to(wide)


def columns_of_difference(columns: Iterable[str]) -> tuple[str, ...]:
    """The columns, the first ones of a row, that are of the difference of a pair."""
    return tuple(column for column in columns if column not in PAIR_COLUMNS)


def further_terms(
    own: torch.Tensor, reference: torch.Tensor, columns: Iterable[str]
) -> list[tuple[torch.Tensor, tuple[str, ...]]]:
    """The tensors whose columns, one after the other, are the rest of a row."""
    terms: list[tuple[torch.Tensor, tuple[str, ...]]] = []
    # In the order of PAIR_COLUMNS.
    if "reference_sum_squares" in columns:
        terms.append((reference, ("sum_squares",)))
    if "own_sum_squares" in columns:
        terms.append((own, ("sum_squares",)))
    if "dot" in columns:
        wide = torch.promote_types(own.dtype, torch.float32)
        own, reference = own.to(wide), reference.to(wide)
        products = (own * reference.conj()).real if own.is_complex() else own * reference
        terms.append((products, ("sum",)))
    return terms


def can_be_read_together(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a kernel can reduce the pair while it reads both."""
    alike = own.shape == other.shape and own.device == other.device
    return alike and own.dtype in DTYPES and other.dtype in DTYPES


def lie_alike(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the elements of both lie densely in memory, in one order."""
    if own.is_contiguous() and other.is_contiguous():
        return True
    return own.stride() == other.stride() and is_dense(own)


def is_read_as_it_lies(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a kernel of an accelerator can reduce the pair, and needs no copy for it."""
    return can_be_read_together(own, other) and lie_alike(own, other)


def flatten_pair(own: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with their elements densely in memory, in one order; copied where they lie otherwise."""
    if own.is_contiguous() and other.is_contiguous():
        return own, other
    if own.stride() != other.stride():
        own, other = own.contiguous(), other.contiguous()
    return flatten(own), flatten(other)


def pieces_of_pairs(pairs: Pairs) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """Pairs with their places, in parts that are not large; large ones come in pieces.

    On a CPU each is whole, as the pieces of sums would be rounded otherwise.
    """
    part: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    size = 0
    for place, (own, other) in enumerate(pairs):
        pieces = [(own, other)]
        if own.device.type != "cpu" and own.numel() > _MOST:
            flat = flatten_pair(own.detach(), other.detach())
            pieces = list(zip(*(x.reshape(-1).split(_MOST) for x in flat), strict=True))
        for piece in pieces:
            if part and size + piece[0].numel() > _MOST:
                yield part
                part, size = [], 0
            part.append((place, *piece))
            size += piece[0].numel()
    if part:
        yield part
