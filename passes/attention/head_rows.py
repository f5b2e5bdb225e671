"""The rows of one attention: statistics of its heads, and of the tensors that they are made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from tmm.core.families import ATTENTION
from tmm.core.metrics import COLUMN_SEPARATOR, Reduction
from tmm.core.records import AttentionRequest, Measurement, Share, Site, Slot
from tmm.kernels.attention.attention_call import arrange
from tmm.kernels.attention.attention_torch import summarize_attention_with_torch
from tmm.kernels.ops import (
    attention_heads,
    select_statistics,
    stride_of,
    summarize,
    summarize_attention,
    summarize_heads,
)
from tmm.kernels.unreadable import why_unmeasurable
from tmm.passes.attention.found import FoundAttention
from tmm.passes.graph.rewriter import Rewriter
from tmm.passes.graph.sharding import Placed, Placements, is_distributed, is_split_along
from tmm.passes.graph.slots import add_slots
from tmm.passes.graph.values import local_example, value_of
from tmm.passes.metrics.trace import insert_traced, trace

_MOST_BLOCKS = 8  # of queries and of keys, in flex_attention: a compiler sees every one of them
_HEAD = re.compile(r"\.head_(\d+)")


@dataclass
class Heads:
    """The rows of one attention of a graph; ``last`` is the node after which they go."""

    found: FoundAttention
    site: Site
    request: AttentionRequest
    placements: Placements | None
    last: Node

    def insert(self) -> None:
        """Insert the rows."""
        if self.request.statistics:
            self._statistics()
        found = self.found
        parts = {"query": found.query, "key": found.key, "value": found.value}
        if found.output is not None:
            parts["activation"] = found.output
        for name, tensor in parts.items():
            if self.last < tensor:
                self.last = tensor
            for reduction in self.request.parts:
                turned = name == "key" and found.key_is_turned
                self._part(name, tensor, reduction, turned=turned)

    def _statistics(self) -> None:
        found, request = self.found, self.request
        names = tuple(name for reduction in request.statistics for name in reduction.metrics)

        def rows(query: torch.Tensor, key: torch.Tensor, *masks: torch.Tensor) -> torch.Tensor:
            return summarize_attention(
                *(_split(query, found.heads), _split(_turn(key, found.key_is_turned), found.heads)),
                *(_join(found, masks, query.dtype), found.is_causal, found.scale),
                *(request.queries, request.pooled, COLUMN_SEPARATOR.join(names)),
            )

        def flexible_rows(
            query: torch.Tensor, key: torch.Tensor, *tensors: torch.Tensor
        ) -> torch.Tensor:
            assert found.scores is not None
            query, key = _split(query, found.heads), _turn(key, found.key_is_turned)
            stride = stride_of(query, request.queries)
            call = arrange(query, _split(key, found.heads), None, False, found.scale, stride)
            scores = found.scores

            def modify(logits: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
                return scores.apply(logits, indices, tensors)

            measured = summarize_attention_with_torch(call, modify, most_blocks=_MOST_BLOCKS)
            return select_statistics(measured, COLUMN_SEPARATOR.join(names), pooled=request.pooled)

        values = (found.query, found.key, *(mask.tensor for mask in found.masks), *found.tensors)
        count = attention_heads(*(_split(_example(v), found.heads) for v in values[:2]))
        measured = tuple(
            Measurement(ATTENTION.of(reduction.metrics[0]), site, reduction)
            for site in self._sites(count)
            for reduction in request.statistics
        )
        function = rows if found.scores is None else flexible_rows
        self._insert(function, values, request.statistics[0], measured)

    def _part(self, name: str, tensor: Node, reduction: Reduction, *, turned: bool) -> None:
        pooled = self.request.pooled

        def rows(part: torch.Tensor) -> torch.Tensor:
            part = _split(_turn(part, turned), self.found.heads)
            part = part[None] if part.dim() == 2 else part
            if reduction.function is not None:
                part = _apply(reduction, part, pooled=pooled)
            columns = COLUMN_SEPARATOR.join(reduction.columns)
            return (summarize if pooled else summarize_heads)(part, columns)

        example = _split(_turn(_example(tensor), turned), self.found.heads)
        count = int(example.shape[-3]) if example.dim() > 2 else 1
        measured = tuple(
            Measurement("activation", replace(site, path=f"{site.path}.{name}"), reduction)
            for site in self._sites(count)
        )
        self._insert(rows, (tensor,), reduction, measured)

    def _sites(self, count: int) -> list[Site]:
        if self.request.pooled:
            return [self.site]
        return [replace(self.site, path=f"{self.site.path}.head_{i}") for i in range(count)]

    def _insert(
        self,
        function: Callable[..., torch.Tensor],
        values: Sequence[Node],
        reduction: Reduction,
        measured: tuple[Measurement, ...],
    ) -> None:
        if self.placements is not None:
            measured = tuple(_placed(self.placements, values, measured))
        at = Rewriter(self.last.graph, self.last)
        traced = trace(function, [_example(value).detach() for value in values], reduction)
        parts = (at.call("to_local", v) if is_distributed(value_of(v)) else v for v in values)
        row = insert_traced(at, traced, [at.call("detach", part) for part in parts])
        for head, measurement in enumerate(measured):
            add_slots(row, Slot.of(measurement, head * measurement.reduction.width))
            at.credit(measurement.family, measurement.site)
        self.last = at.last


def _placed(
    placements: Placements, values: Sequence[Node], measured: Iterable[Measurement]
) -> Iterator[Measurement]:
    """The measurements of heads, which this rank may be the only one to have, with their numbers.

    Of several values the first two are query and key; masks are as every rank has them.
    """
    share = placements.share(*values)
    first = placements.first_head(*values[:2])
    if first is not None or placements.are_items(*values[:2]):
        share = Share("part")
    elif share.kind not in ("whole", "copy"):
        own = "each rank numbers the heads that it has from 0"
        share = Share("unknown", f"{own}; {share.reason}" if share.reason else own)
    for measurement in measured:
        head = _HEAD.search(measurement.site.path)
        if first is None or head is None:
            yield replace(measurement, share=share)
            continue
        path = f"{measurement.site.path[: head.start(1)]}{first + int(head[1])}"
        site = replace(measurement.site, path=path + measurement.site.path[head.end(1) :])
        yield replace(measurement, site=site, share=Share("whole"))


def why_unreadable(found: FoundAttention) -> str | None:
    """Why the tensors of an attention cannot be measured; None if they can."""
    examples = [value_of(node) for node in (found.query, found.key, found.value)]
    if any(is_split_along(example, example.dim() - 2) for example in examples):
        return (
            "ranks have parts of its sequence (context parallel): the keys of this rank are not all"
            " of those that its queries attend to"
        )
    if reason := _why_parts_are_unreadable(found):
        return reason
    for node in (found.query, found.key, found.value):
        example = _example(node)
        reason = "nested tensors" if example.is_nested else why_unmeasurable(example)
        if reason:
            return reason
    query, key, *masks = (
        _example(node).detach()
        for node in (found.query, found.key, *(mask.tensor for mask in found.masks))
    )
    try:
        with query.fake_mode:  # type: ignore[attr-defined]
            key = _split(_turn(key, found.key_is_turned), found.heads)
            mask = _join(found, masks, query.dtype)
            arrange(_split(query, found.heads), key, mask, found.is_causal, found.scale, 1)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"its tensors do not fit together: {error}"
    return None


def _why_parts_are_unreadable(found: FoundAttention) -> str | None:
    """Why the parts of DTensors do not have the attention of each of their heads."""
    masks = [mask.tensor for mask in found.masks] + list(found.tensors)
    nodes = (found.query, found.key, found.value, *masks)
    placed = {node: Placed.of(value_of(node)) for node in nodes}
    ways = {placed[node] for node in (found.query, found.key, found.value)}
    if not any(placed.values()):
        return None
    (way,) = ways if len(ways) == 1 else (None,)
    known = way is not None and found.heads is None and value_of(found.query).dim() == 4
    if way is None or not known or not (way.is_replicated or way.dimension in (0, 1)):
        return (
            "its tensors are DTensors that are not all split by heads, or by items of the batch;"
            " make them local ones (use_local_output=True)"
        )
    if not all(_is_like(mask, placed[mask], way) for mask in masks):
        return "its masks are DTensors that are split in another way than query and key"
    return None


def _is_like(mask: Node, own: Placed | None, way: Placed) -> bool:
    return own is None or own.is_replicated or (own == way and value_of(mask).dim() == 4)


def _example(node: Node) -> torch.Tensor:
    """The traced value of a node, of a DTensor what this rank has."""
    example: torch.Tensor = local_example(value_of(node))
    return example


def _turn(key: torch.Tensor, turned: bool) -> torch.Tensor:
    return key.transpose(-2, -1) if turned else key


def _split(tensor: torch.Tensor, heads: int | None) -> torch.Tensor:
    """Batch and heads apart, where they are one dimension."""
    if heads is None or tensor.dim() != 3:
        return tensor
    apart: torch.Tensor = tensor.unflatten(0, (-1, heads))
    return apart


def _join(
    found: FoundAttention, masks: Sequence[torch.Tensor], dtype: torch.dtype
) -> torch.Tensor | None:
    """One mask that does what all of them do."""
    joined: torch.Tensor | None = None
    heads = found.heads
    tensors = [
        _split(tensor, heads) if mask.has_joined_heads else tensor
        for mask, tensor in zip(found.masks, masks, strict=True)
    ]
    for mask, tensor in zip(found.masks, tensors, strict=True):
        if mask.kind == "added":
            added = tensor if tensor.dtype.is_floating_point else tensor.to(dtype)
            joined = added if joined is None else joined + added
    for mask, tensor in zip(found.masks, tensors, strict=True):
        if mask.kind == "added":
            continue
        allowed = tensor if mask.kind == "allowed" else ~tensor
        if joined is None:
            joined = allowed
        elif joined.dtype == torch.bool:
            joined = joined & allowed
        else:
            joined = torch.where(allowed, joined, float("-inf"))
    return joined


def _apply(reduction: Reduction, part: torch.Tensor, *, pooled: bool) -> torch.Tensor:
    """The values of a user's function, of each head where they are not pooled."""
    function: Any = reduction.function
    if pooled:
        whole: torch.Tensor = torch.as_tensor(function(part))
        return whole
    values = torch.func.vmap(lambda head: torch.as_tensor(function(head)))(part.movedim(-3, 0))
    heads: torch.Tensor = values.reshape(values.shape[0], 1, -1)
    return heads
