"""Statistics of scaled-dot-product attention per head, in memory linear in the sequence length.

Nothing here forms the matrix of logits. A CPU has a kernel of its own
(``attention_host``), and so has a GPU with Triton (``attention_triton``); elsewhere torch
operations on blocks serve (``attention_torch``).
"""

from __future__ import annotations

import importlib.util

import torch

from tmm.kernels.attention.attention_call import arrange, arrange_nothing
from tmm.kernels.attention.attention_host import summarize_attention_on_host
from tmm.kernels.attention.attention_torch import summarize_attention_with_torch


def summarize_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
    query_stride: int = 1,
) -> torch.Tensor:
    """One row of sums per head.

    A query sees a key if the mask and ``is_causal`` both allow it; its logits are
    ``scale * query @ key + float mask`` over those keys. Queries that see none add nothing. A logit
    that is NaN or inf makes the head's sums and maximum NaN, and no other head's.

    Args:
        query: Shape ``(..., H, L, E)``, of any strides; ``(H, L, E)`` and ``(L, E)`` serve as well.
        key: Shape ``(..., H_kv, S, E)`` on the same device, H a multiple of H_kv: query head ``h``
            reads key head ``h // (H // H_kv)``. Leading dimensions broadcast.
        mask: None, boolean (True allows) or floating-point (added to the logits; up to -9999 it
            forbids), broadcastable to ``(..., H, L, S)``.
        is_causal: Query i sees key j only if ``j <= i``, also where L differs from S.
        scale: None stands for ``1 / sqrt(E)``.
        query_stride: Every so many queries are measured, beginning with the first.

    Returns:
        Float64 (``packed_dtype``), shape ``(H, len(ATTENTION_COLUMNS))``, joined over the measured
        queries and all leading dimensions. On a GPU it is not ready yet when this returns.

    Raises:
        ValueError: The head dimensions or the numbers of heads do not fit together.
        RuntimeError: The other dimensions do not broadcast.
        TypeError: The mask is neither boolean nor floating-point.
    """
    call = None
    if mask is None and query_stride == 1:
        call = arrange_nothing(query, key, is_causal, scale)
    call = call or arrange(query, key, mask, is_causal, scale, query_stride)
    if query.device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from tmm.kernels.attention.attention_triton import summarize_attention_with_triton

        return summarize_attention_with_triton(call)
    rows = summarize_attention_on_host(call) if query.device.type == "cpu" else None
    return summarize_attention_with_torch(call) if rows is None else rows
