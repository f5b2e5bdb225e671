"""Rows of pairs of tensors whose differences are written down: a part of them at a time."""

from __future__ import annotations

import torch

from tmm.kernels.dense import on_device
from tmm.kernels.summarize.differences import (
    Pairs,
    columns_of_difference,
    difference,
    further_terms,
    pieces_of_pairs,
)
from tmm.kernels.summarize.group import merge_rows, summarize_group


def summarize_pairs_with_torch(pairs: Pairs, columns: tuple[str, ...]) -> torch.Tensor:
    """The rows of ``summarize_pairs``, of any tensors on any device."""
    needed = columns if "count" in columns else ("count", *columns)  # merging weighs by it
    owners: list[int] = []
    parts: list[torch.Tensor] = []
    for part in pieces_of_pairs(pairs):
        owners += [owner for owner, _, _ in part]
        parts.append(_rows_of_part([(a, b) for _, a, b in part], needed))
    joined = torch.cat(parts)
    if len(owners) > len(pairs):
        owner = on_device(torch.tensor(owners, device="cpu"), joined.device)
        joined = merge_rows(joined, owner, len(pairs), needed)
    return joined[:, len(needed) - len(columns) :]


def _rows_of_part(pairs: Pairs, columns: tuple[str, ...]) -> torch.Tensor:
    """The rows of pairs whose differences may be written down together."""
    differences = [difference(a, b) for a, b in pairs]
    rows = [summarize_group(differences, columns_of_difference(columns))]
    del differences
    for term in zip(*(further_terms(a, b, columns) for a, b in pairs), strict=True):
        tensors, needed = zip(*term, strict=True)
        rows.append(summarize_group(tensors, needed[0]))
    return torch.cat(rows, 1)
