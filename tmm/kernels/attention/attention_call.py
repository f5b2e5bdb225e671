"""What a kernel measures of an attention, and what it gives, the same for all kernels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tmm.kernels.dense import packed_dtype

ATTENTION_COLUMNS = (
    "count",
    "entropy",
    "normalized_entropy",
    "logsumexp",
    "max_probability",
    "sink_mass",
    "max_logit",
)
"""What a row holds of a head: sums over the queries that may see a key, and a maximum.

``count`` is the number of such queries, ``entropy`` in nats, ``normalized_entropy`` divided by the
logarithm of the number of allowed keys (0 for a single one), ``logsumexp`` that of the logits,
``max_probability`` the largest and ``sink_mass`` that of key 0. ``max_logit`` is the maximum over
all queries, -inf without one.
"""

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def forbidden_up_to(dtype: torch.dtype) -> float:
    """The largest value by which a float mask of a dtype forbids a key.

    Models write -inf, finfo.min or -10000, which bfloat16 rounds to -9984.
    """
    return float(torch.tensor(-9999.0, dtype=dtype, device="cpu"))


def chosen_columns(statistics: Sequence[str]) -> list[int]:
    """The columns of count and value of each of the ``statistics``, one after the other."""
    return [i for name in statistics for i in (0, ATTENTION_COLUMNS.index(name))]


@functools.lru_cache(maxsize=1024)
def chosen_elements(heads: int, statistics: tuple[str, ...]) -> torch.Tensor:
    """Where ``chosen_columns`` lie in all elements of rows, head by head; of a CPU."""
    starts = torch.arange(heads, device="cpu")[:, None] * len(ATTENTION_COLUMNS)
    return (starts + torch.tensor(chosen_columns(statistics), device="cpu")).reshape(-1)


@dataclass(frozen=True)
class AttentionCall:
    """What a kernel measures, with all dimensions spelled out; views of what the caller passed."""

    query: torch.Tensor
    """The measured queries, (batch, heads, queries, channels)."""
    key: torch.Tensor
    """Of the same dtype, (batch, key heads, keys, channels)."""
    mask: torch.Tensor | None
    """Boolean or floating-point, (batch, heads, queries, keys)."""
    query_step: int
    """Distance of the measured queries in the sequence."""
    is_causal: bool
    scale: float

    def empty_rows(self) -> torch.Tensor:
        """The rows where no query sees a key."""
        device = self.query.device
        row = torch.zeros(len(ATTENTION_COLUMNS), dtype=packed_dtype(device), device=device)
        row.select(0, ATTENTION_COLUMNS.index("max_logit")).fill_(-math.inf)
        return row.repeat(self.query.shape[1], 1)

    @property
    def is_empty(self) -> bool:
        """Whether there is no pair of a query and a key."""
        return 0 in (*self.query.shape[:3], self.key.shape[2])


def arrange(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    query_stride: int,
) -> AttentionCall:
    """The arguments of ``summarize_attention`` in one form."""
    if query_stride < 1:
        raise ValueError(f"query_stride: must be at least 1, not {query_stride}")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"query, key: the last dimensions differ ({query.shape[-1]} and {key.shape[-1]})"
        )
    channels = query.shape[-1]
    dtype = torch.promote_types(query.dtype, key.dtype)
    dtype = dtype if dtype in _DTYPES else torch.float32
    query, key = (_at_least_3d(x).to(dtype) for x in (query, key))
    tensors = [query, key]
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"mask: must be boolean or floating-point, not {mask.dtype}")
        mask = _at_least_3d(mask)
        mask = mask if mask.dtype in (torch.bool, *_DTYPES) else mask.float()
        mask = mask.expand(*mask.shape[:-2], query.shape[-2], key.shape[-2])[..., ::query_stride, :]
        tensors.append(mask)
    query = query[..., ::query_stride, :]
    batch = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in tensors))
    heads = [tensor.shape[-3] for tensor in tensors]
    most = max(heads)
    whole = most == 0 or (heads[1] > 0 and most % heads[1] == 0)
    if not whole or any(some not in (1, most) for some in (heads[0], *heads[2:])):
        raise ValueError(
            f"query, key, mask: numbers of heads {heads} do not fit together; that of query must "
            "be a multiple of that of key, and that of mask the same or 1"
        )
    return AttentionCall(
        query=_spread(query, batch, most),
        key=_spread(key, batch, heads[1]),
        mask=None if mask is None else _spread(mask, batch, most),
        query_step=query_stride,
        is_causal=is_causal,
        scale=_factor(channels, scale),
    )


def arrange_nothing(
    query: torch.Tensor, key: torch.Tensor, is_causal: bool, scale: float | None
) -> AttentionCall | None:
    """The same of all queries and no mask, if both tensors are what a kernel takes.

    They mostly are. Even the operations of ``arrange`` that change nothing take half as long as a
    CPU takes to measure a short sequence. Not for traced programs: gradients are not cut off.
    """
    if query.dim() != 4 or key.dim() != 4 or query.dtype != key.dtype:
        return None
    batch, heads, _, channels = query.shape
    key_batch, key_heads, _, key_channels = key.shape
    is_arranged = (
        query.dtype in _DTYPES
        and batch == key_batch
        and channels == key_channels
        and heads >= key_heads > 0
        and heads % key_heads == 0
        and not query.is_neg()
        and not key.is_neg()
    )
    if not is_arranged:
        return None
    return AttentionCall(query, key, None, 1, is_causal, _factor(channels, scale))


def _factor(channels: int, scale: float | None) -> float:
    return 1 / math.sqrt(max(channels, 1)) if scale is None else float(scale)


def _at_least_3d(x: torch.Tensor) -> torch.Tensor:
    x = x.detach().resolve_neg()
    return x.view(*[1] * (3 - x.dim()), *x.shape)


def _spread(x: torch.Tensor, batch: torch.Size, heads: int) -> torch.Tensor:
    """``x`` with ``heads`` heads and one dimension in place of all leading ones."""
    spread = x.expand(*batch, *x.shape[-3:]).reshape(batch.numel(), *x.shape[-3:])
    return spread.expand(-1, heads, -1, -1)
