"""Statistics of attention on a GPU: one launch, each program reads some queries of one head.

It meets the keys block by block, keeps the running sums of its queries in registers and writes one
row, so that only rows take memory; two torch operations join them. Nothing waits for the device.

Run in Triton's interpreter only so far, and compiled for sm_90 and sm_80; never on a real GPU.
"""
# mypy: disable-error-code="untyped-decorator,no-untyped-def,misc,unused-ignore"

from __future__ import annotations

import contextlib

import torch

from tmm.kernels.attention.attention_call import ATTENTION_COLUMNS, AttentionCall, forbidden_up_to
from tmm.kernels.attention.attention_torch import summarize_attention_with_torch
from tmm.kernels.optional_triton import tl, triton

_MOST_CHANNELS = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 256}
"""Those whose queries and keys fit the shared memory of every GPU since sm_80."""

_UNMASKED, _BOOLEAN, _ADDED = range(3)  # kinds of masks


def summarize_attention_with_triton(call: AttentionCall) -> torch.Tensor:
    """The rows of ``summarize_attention``; torch operations serve float64 and wide heads."""
    query, key, mask = call.query, call.key, call.mask
    channels = query.shape[3]
    if call.is_empty or channels > _MOST_CHANNELS.get(query.dtype, 0):
        return summarize_attention_with_torch(call)
    kind, limit = _UNMASKED, 0.0
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask_strides = mask.stride()
        if mask.dtype == torch.bool:
            kind, mask = _BOOLEAN, mask.view(torch.uint8)
        else:
            kind, limit = _ADDED, forbidden_up_to(mask.dtype)
    batch, heads, queries, _ = query.shape
    is_long = query.dtype == torch.float32  # without matrix units, of which blocks are larger
    size = 32 if is_long else 64
    blocks = -(-queries // size)
    shape = (batch, heads, blocks, len(ATTENTION_COLUMNS))
    rows = torch.empty(shape, dtype=torch.float64, device=query.device)
    guard = torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext()
    with guard:  # the interpreter has no device
        _summarize_queries[(batch * heads * blocks,)](
            query,
            key,
            query if mask is None else mask,
            rows,
            *query.stride(),
            *key.stride(),
            *mask_strides,
            heads,
            heads // key.shape[1],
            queries,
            key.shape[2],
            channels,
            call.query_step,
            call.scale,
            limit,
            MASK=kind,
            IS_CAUSAL=call.is_causal,
            COLUMNS=len(ATTENTION_COLUMNS),
            QUERIES=size,
            KEYS=32 if is_long or channels > 128 else 64,
            CHANNELS=max(triton.next_power_of_2(channels), 16),  # a matrix unit needs 16
            num_warps=4,
        )
    last = ATTENTION_COLUMNS.index("max_logit")
    return torch.cat([rows[..., :last].sum((0, 2)), rows[..., last:].amax((0, 2))], dim=1)


@triton.jit
def _deviation(logits, centre):
    """Difference from the maximum, raised to a value whose exponential is 0; NaN stays."""
    difference = logits - centre
    return tl.where(difference < -110.0, -110.0, difference)


@triton.jit
def _summarize_queries(
    query,
    key,
    mask,
    rows,
    query_batch,  # strides
    query_head,
    query_row,
    query_channel,
    key_batch,
    key_head,
    key_row,
    key_channel,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    heads,
    group,
    queries,
    keys,
    channels,
    step,
    scale,
    limit,
    MASK: tl.constexpr,  # noqa: N803 -- Triton's way of writing constants
    IS_CAUSAL: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
):
    """Write the row of one block of queries of one head."""
    blocks = tl.cdiv(queries, QUERIES)
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    block = blocks - 1 - tl.program_id(0) % blocks  # those that see most keys go first
    batch = pair // heads
    head = pair % heads
    query += batch * query_batch + head * query_head
    key += batch * key_batch + head // group * key_head
    mask += batch * mask_batch + head * mask_head

    index = block * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, CHANNELS)
    inside = index < queries
    wide_index = index.to(tl.int64)
    wide_channel = channel.to(tl.int64)
    own = tl.load(
        query + wide_index[:, None] * query_row + wide_channel[None, :] * query_channel,
        mask=inside[:, None] & (channel < channels)[None, :],
        other=0.0,
    )
    position = index * step

    infinity = float("inf")
    maximum = tl.full([QUERIES], -infinity, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    weighted = tl.zeros([QUERIES], tl.float32)
    sink = tl.full([QUERIES], -infinity, tl.float32)
    number = tl.zeros([QUERIES], tl.int32)
    end = keys
    if IS_CAUSAL:
        end = tl.minimum(keys, (tl.minimum(block * QUERIES + QUERIES, queries) - 1) * step + 1)
    for start in range(0, end, KEYS):
        column = start + tl.arange(0, KEYS)
        wide_column = column.to(tl.int64)
        met = tl.load(
            key + wide_channel[:, None] * key_channel + wide_column[None, :] * key_row,
            mask=(channel < channels)[:, None] & (column < keys)[None, :],
            other=0.0,
        )
        logits = tl.dot(own, met, input_precision="ieee") * scale
        allowed = inside[:, None] & (column < keys)[None, :]
        if IS_CAUSAL:
            allowed = allowed & (column[None, :] <= position[:, None])
        if MASK != 0:
            value = tl.load(
                mask + wide_index[:, None] * mask_row + wide_column[None, :] * mask_column,
                mask=allowed,
                other=0,
            )
            if MASK == 1:
                allowed = allowed & (value != 0)
            else:
                value = value.to(tl.float32)
                allowed = allowed & ((value > limit) | (value != value))  # NaN stays
                logits += value
        logits = tl.where(allowed, logits, -infinity)
        number += tl.sum(allowed.to(tl.int32), 1)
        if start == 0:
            sink = tl.max(tl.where(column[None, :] == 0, logits, -infinity), 1)
        highest = tl.maximum(maximum, tl.max(logits, 1))
        centre = tl.where(highest == -infinity, 0.0, highest)
        exponents = _deviation(logits, centre[:, None])
        terms = tl.exp(exponents)
        change = _deviation(maximum, centre)
        factor = tl.exp(change)
        weighted = factor * (weighted + change * total) + tl.sum(terms * exponents, 1)
        total = factor * total + tl.sum(terms, 1)
        maximum = highest

    some = number > 0
    # A logit is NaN or infinite, or none is finite.
    valid = total > 0.0
    undefined = float("nan")
    total = tl.where(valid, total, undefined).to(tl.float64)
    maximum = tl.where(valid, maximum, undefined).to(tl.float64)
    logarithm = tl.log(total)
    entropy = logarithm - weighted.to(tl.float64) / total
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    normalized = entropy / tl.log(tl.maximum(number, 2).to(tl.float64))
    logsumexp = maximum + logarithm
    sink_mass = tl.exp(sink.to(tl.float64) - maximum) / total
    maximum = tl.where(some, maximum, -infinity)
    is_undefined = tl.sum((maximum != maximum).to(tl.int32), 0) > 0
    # Whether a maximum carries NaN depends on the device, so that it is put in here.
    highest_logit = tl.max(tl.where(maximum != maximum, -infinity, maximum), 0)
    row = rows + (pair * blocks + block) * COLUMNS
    tl.store(row, tl.sum(some.to(tl.float64), 0))
    tl.store(row + 1, tl.sum(tl.where(some, entropy, 0.0), 0))
    tl.store(row + 2, tl.sum(tl.where(some, normalized, 0.0), 0))
    tl.store(row + 3, tl.sum(tl.where(some, logsumexp, 0.0), 0))
    tl.store(row + 4, tl.sum(tl.where(some, 1.0 / total, 0.0), 0))
    tl.store(row + 5, tl.sum(tl.where(some, sink_mass, 0.0), 0))
    tl.store(row + 6, tl.where(is_undefined, undefined, highest_logit))
