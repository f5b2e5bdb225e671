"""Kernels of a GPU, compiled when a graph is, and not inside of the first step that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch.fx import GraphModule, Node

from tmm.core.metrics import COLUMN_SEPARATOR
from tmm.kernels.dense import real_dtype
from tmm.kernels.fused.merge_operator import merge_parts
from tmm.kernels.ops import summarize, summarize_difference, summarize_into
from tmm.kernels.plain_operations import why_no_triton
from tmm.kernels.summarize.differences import can_be_read_together, columns_of_difference
from tmm.kernels.summarize.inductor_rows import compile_ahead
from tmm.kernels.summarize.many import summarize_many
from tmm.passes.graph.provenance import all_nodes
from tmm.passes.graph.readings import hinted_elements
from tmm.passes.graph.values import value_of
from tmm.passes.metrics.gradient_probe import Part, probe, spread_rows


def compile_kernels(module: GraphModule) -> None:
    """Compile what the sites of a rewritten graph need of a GPU, those of gradients included.

    The running graph would compile it otherwise: in the thread of the backward pass, or while a
    CUDA graph is warmed up.
    """
    for node in all_nodes(module):
        if node.target is summarize_difference:
            own, other = map(_example, node.args[:2])
            if own is not None and other is not None and can_be_read_together(own, other):
                names = tuple(str(node.args[2]).split(COLUMN_SEPARATOR))
                compile_pairs(own, other, names)
                continue
        if node.target is summarize_many:
            tensors, columns = node.args
            assert isinstance(tensors, (list, tuple))
            given = [tensor for tensor in map(_example, tensors) if tensor is not None]
            compile_group(given, tuple(str(columns).split(COLUMN_SEPARATOR)))
        if (partials := _merged(node)) is not None:
            prepare_merge(*partials)
        for tensor, columns, dtype in _needs(node):
            elements = hinted_elements(tensor)
            compile_ahead(elements, tuple(columns.split(COLUMN_SEPARATOR)), dtype, tensor.device)


def compile_pairs(own: torch.Tensor, other: torch.Tensor, columns: tuple[str, ...]) -> None:
    """Compile the kernel that reads both, if it serves their device."""
    if own.device.type == "cuda" and why_no_triton(own.device) is None:
        from tmm.kernels.summarize.group_ahead import compile_pairs_ahead

        elements = hinted_elements(own)
        compile_pairs_ahead(own.dtype, other.dtype, columns, elements, own.device)


def compile_group(tensors: Sequence[torch.Tensor], columns: tuple[str, ...]) -> None:
    """Compile the kernels that read several tensors, if Triton does on their device."""
    device = tensors[0].device
    if device.type == "cuda" and why_no_triton(device) is None:
        from tmm.kernels.summarize.group_ahead import compile_group_ahead

        compile_group_ahead((tensor.dtype for tensor in tensors), columns, device)


def prepare_merge(rows: Sequence[int], layout: Sequence[int], device: torch.device) -> None:
    """Make what merges partials ready, if Triton does it on that device."""
    if device.type == "cuda" and why_no_triton(device) is None:
        from tmm.kernels.fused.merge_triton import prepare

        prepare(tuple(rows), tuple(layout), device)


def _merged(node: Node) -> tuple[list[int], list[int], torch.device] | None:
    """The rows, layouts and device of partials that a node merges, or its backward pass."""
    layout: list[int] = []
    if node.target is merge_parts:
        given, layout = cast("tuple[list[Node], list[int]]", node.args)
        shapes = [value_of(part).shape for part in given]
        device = value_of(given[0]).device
    elif node.target is spread_rows:
        row_input, parts, _ = cast("tuple[Node, list[Part], str]", node.args)
        shapes = [part.shape for part in parts]
        layout = [number for part in parts for number in part.layout]
        device = value_of(row_input).device
    if not layout or not all(isinstance(rows, int) for _, rows in shapes):
        return None
    return [rows for _, rows in shapes], layout, device


def _needs(node: Node) -> Iterator[tuple[torch.Tensor, str, torch.dtype]]:
    """The tensors that a node reduces, the columns, and the dtype in which it does."""
    if node.target in (summarize, summarize_into):
        tensor, columns = _example(node.args[0 if node.target is summarize else 2]), node.args[-1]
        if tensor is not None:
            yield tensor, str(columns), real_dtype(tensor)
    elif node.target is summarize_difference:
        own, other = map(_example, node.args[:2])
        columns = columns_of_difference(str(node.args[2]).split(COLUMN_SEPARATOR))
        if own is not None and other is not None and columns:
            wide = torch.promote_types(torch.promote_types(own.dtype, other.dtype), torch.float32)
            yield own, COLUMN_SEPARATOR.join(columns), wide.to_real()
    elif node.target is probe:
        tensor = _example(node.args[0])
        _, _, given, fused, _, factor = node.args
        if tensor is not None and isinstance(given, (tuple, list)):
            dtype = real_dtype(tensor)
            if factor is not None:
                dtype = torch.promote_types(dtype, torch.float32)
            assert isinstance(fused, (tuple, list))
            for columns, how in zip(given, fused, strict=True):
                if columns and how is None:
                    yield tensor, str(columns), dtype


def _example(argument: object) -> torch.Tensor | None:
    value = value_of(argument) if isinstance(argument, Node) else None
    return value if isinstance(value, torch.Tensor) else None
