"""Statistics of scaled-dot-product attention per head, in memory linear in the sequence length.

No kernel forms the matrix of logits: neither that of a CPU (``attention_host``), nor that of a GPU
with Triton (``attention_triton``), nor torch operations on blocks (``attention_torch``). Which one
runs is decided in ``tmm.kernels.kernel_registry``.
"""

from __future__ import annotations

import torch

from tmm.kernels import kernel_registry
from tmm.kernels.attention.attention_call import arrange, arrange_nothing


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
    return kernel_registry.run("summarize_attention", query.device, call)
