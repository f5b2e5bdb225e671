"""Statistics of attention by torch operations on blocks of queries and keys, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch

from tmm.kernels.attention.attention_call import ATTENTION_COLUMNS, AttentionCall, forbidden_up_to
from tmm.kernels.attention.exact_products import exact_products
from tmm.kernels.dense import accumulation_dtype, packed_dtype

Modify: TypeAlias = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]
"""What flex_attention's ``score_mod`` and mask do, on a block.

Called with the scaled logits of shape (batch, heads, queries, keys) and the indices of batch, head,
query and key, int64 and broadcastable to it; returns the logits, -inf where a key is not allowed.
"""

_KEYS = 512  # per block
_FEWEST_QUERIES = 16  # per block, so that the number of operations stays small
_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 24}
"""Logits of a block: those that a cache holds, or that make waiting for launches rare."""


def summarize_attention_with_torch(
    call: AttentionCall,
    modify: Modify | None = None,
    *,
    most_blocks: int | None = None,
) -> torch.Tensor:
    """The rows of ``summarize_attention``; all logits are passed through ``modify`` first.

    With ``most_blocks`` queries and keys are each cut into so many blocks at most, for a compiler
    that sees every one of them.

    Returns:
        ``packed_dtype``, shape ``(heads, len(ATTENTION_COLUMNS))``.
    """
    if call.is_empty:
        return call.empty_rows()
    device = call.query.device
    batch, heads, queries, _ = call.query.shape
    fitting = _ELEMENTS.get(device.type, 1 << 22) // (batch * heads * _KEYS)
    size, width = max(fitting, _FEWEST_QUERIES), _KEYS
    if most_blocks is not None:
        size = max(size, -(-queries // most_blocks))
        width = max(width, -(-call.key.shape[2] // most_blocks))
    # Autocast would multiply in a shorter dtype, and TF32 has the digits of one.
    exact = exact_products(device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False), exact:
        blocks = [
            _summarize_queries(call, start, min(start + size, queries), width, modify)
            for start in range(0, queries, size)
        ]
        rows = torch.stack(blocks)
        last = ATTENTION_COLUMNS.index("max_logit")
        return torch.cat([rows[..., :last].sum(0), rows[..., last:].amax(0)], dim=1)


def _summarize_queries(
    call: AttentionCall, start: int, stop: int, width: int, modify: Modify | None
) -> torch.Tensor:
    """The rows of some of the queries, from ``width`` keys at a time."""
    batch, heads, _, channels = call.query.shape
    key_heads, keys = call.key.shape[1:3]
    dtype, device = accumulation_dtype(call.query.dtype), call.query.device
    # The heads of a group are further rows of one product.
    rows = heads // key_heads * (stop - start)
    query = call.query[:, :, start:stop].to(dtype).reshape(batch, key_heads, rows, channels)
    positions = torch.arange(start, stop, device=device)[:, None] * call.query_step
    if call.is_causal:
        keys = min(keys, (stop - 1) * call.query_step + 1)

    def zeros() -> torch.Tensor:
        return torch.zeros(batch, heads, stop - start, dtype=dtype, device=device)

    maximum, total, weighted, sink = zeros() - math.inf, zeros(), zeros(), zeros()
    number = torch.zeros(batch, heads, stop - start, dtype=torch.int64, device=device)
    for first in range(0, keys, width):
        last = min(first + width, keys)
        product = query @ call.key[:, :, first:last].to(dtype).mT
        logits = product.view(batch, heads, stop - start, last - first) * call.scale
        mask = None if call.mask is None else call.mask[:, :, start:stop, first:last]
        columns = torch.arange(first, last, device=device)
        is_causal = call.is_causal and last - 1 > start * call.query_step
        logits, allowed = _restrict(logits, mask, positions, columns, is_causal, modify)
        if first == 0:
            sink = logits[..., 0]
        number += last - first if allowed is None else allowed.sum(-1)
        highest = torch.maximum(maximum, logits.amax(-1))
        centre = highest.masked_fill(highest == -math.inf, 0)
        exponents = _deviation(logits, centre[..., None])
        terms = exponents.exp()
        change = _deviation(maximum, centre)
        factor = change.exp()
        weighted = factor * (weighted + change * total) + (terms * exponents).sum(-1)
        total = factor * total + terms.sum(-1)
        maximum = highest
    return _finish(maximum, total, weighted, sink, number)


def _restrict(
    logits: torch.Tensor,
    mask: torch.Tensor | None,
    positions: torch.Tensor,
    columns: torch.Tensor,
    is_causal: bool,
    modify: Modify | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits with -inf where a key is not allowed, and where one is; None stands for everywhere."""
    conditions = []
    if modify is not None:
        batch, heads = (torch.arange(size, device=logits.device) for size in logits.shape[:2])
        batch, heads = batch[:, None, None, None], heads[:, None, None]
        logits = modify(logits, batch, heads, positions, columns).to(logits.dtype)
        conditions.append(logits != -math.inf)
    if is_causal:
        conditions.append(columns <= positions)
    if mask is not None and mask.dtype == torch.bool:
        conditions.append(mask)
    elif mask is not None:
        conditions.append(~(mask <= forbidden_up_to(mask.dtype)))  # NaN stays
        logits = logits + mask.to(logits.dtype)
    if not conditions:
        return logits, None
    allowed = conditions[0]
    for condition in conditions[1:]:
        allowed = allowed & condition
    allowed = allowed.expand_as(logits)
    return logits.masked_fill(~allowed, -math.inf), allowed


def _deviation(logits: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Difference from the maximum, raised to a value whose exponential is 0; NaN stays."""
    return (logits - centre).clamp(min=-750 if logits.dtype == torch.float64 else -110)


def _finish(
    maximum: torch.Tensor,
    total: torch.Tensor,
    weighted: torch.Tensor,
    sink: torch.Tensor,
    number: torch.Tensor,
) -> torch.Tensor:
    """Rows from the sums of each query, all of shape (batch, heads, queries)."""
    wide = packed_dtype(total.device)
    maximum, total, weighted, sink = (x.to(wide) for x in (maximum, total, weighted, sink))
    # A logit is NaN or infinite, or none is finite.
    valid = total > 0
    total = torch.where(valid, total, math.nan)
    maximum = torch.where(valid, maximum, math.nan)
    entropy = (total.log() - weighted / total).clamp(min=0)
    sums = {
        "count": torch.ones_like(total),
        "entropy": entropy,
        "normalized_entropy": entropy / number.clamp(min=2).to(wide).log(),
        "logsumexp": maximum + total.log(),
        "max_probability": 1 / total,
        "sink_mass": (sink - maximum).exp() / total,
    }
    some = number > 0
    columns = [torch.where(some, sums[name], 0).sum((0, 2)) for name in ATTENTION_COLUMNS[:-1]]
    columns.append(torch.where(some, maximum, -math.inf).amax((0, 2)))
    return torch.stack(columns, dim=1)
