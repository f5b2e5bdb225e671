"""An identity that measures the gradient which passes it in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from tmm.core.metrics import COLUMN_SEPARATOR, Reduction
from tmm.kernels.ops import histogram, summarize
from tmm.passes.graph.sharding import of_gradient
from tmm.passes.metrics.trace import TracedFunction

VERSION = "4"
"""To be changed with what a probe computes: compiled graphs with probes are cached."""


def probe(
    x: torch.Tensor,
    row: torch.Tensor,
    columns: Sequence[str],
    copies: bool = False,
    scaled: bool = False,
) -> torch.Tensor:
    """``x``; in the backward pass the "gradient" of ``row`` is the row of the gradient of ``x``.

    ``columns`` are those of each reduction (empty for a histogram); ``row`` has as many elements.
    With ``copies`` the result is a copy, for tensors that are overwritten later or leave the
    graph; with ``scaled`` the gradient is multiplied with the first element of ``row`` before it
    is measured. The gradient of a ``DTensor`` is measured as it would be placed like the tensor,
    and handed on as it came.
    """
    options = _Options(tuple(columns), copies, scaled)
    result: torch.Tensor = _Probe.apply(x, row, options)  # type: ignore[no-untyped-call]
    return result


class FunctionProbe(torch.nn.Module):
    """A probe that also applies traced functions; ``functions`` go with ``columns``."""

    def __init__(
        self,
        columns: Sequence[str],
        functions: Sequence[TracedFunction | None],
        *,
        copies: bool,
        scaled: bool,
    ) -> None:
        super().__init__()
        self.options = _Options(tuple(columns), copies, scaled, tuple(functions))

    def forward(self, x: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """As ``probe``."""
        result: torch.Tensor = _Probe.apply(x, row, self.options)  # type: ignore[no-untyped-call]
        return result


def columns_of(reduction: Reduction) -> str:
    """The columns of a reduction as a probe takes them."""
    return COLUMN_SEPARATOR.join(reduction.columns)


@dataclass(frozen=True, eq=False)
class _Options:
    columns: tuple[str, ...]
    copies: bool
    scaled: bool
    functions: tuple[TracedFunction | None, ...] = ()

    def row_of(self, gradient: torch.Tensor, row: torch.Tensor | None) -> torch.Tensor:
        if row is not None:
            # Half precision would underflow.
            wide = torch.promote_types(gradient.dtype, torch.float32)
            gradient = gradient.to(wide) * row[0].to(wide)
        functions = self.functions or (None,) * len(self.columns)
        parts = []
        for columns, function in zip(self.columns, functions, strict=True):
            value = gradient
            if function is not None:
                value = function.graph(gradient.clone() if function.mutates else gradient)
            parts.append(summarize(value, columns) if columns else histogram(value))
        return torch.cat(parts)


def placements_of_gradient(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """How the gradient of a ``DTensor`` is to be placed to be measured; None for other tensors."""
    return of_gradient(tensor.placements) if isinstance(tensor, DTensor) else None


def part_of_gradient(gradient: torch.Tensor, placements: tuple[Any, ...] | None) -> torch.Tensor:
    """What this rank has of a gradient that is placed so.

    Where the gradient is placed in another way, the ranks of its mesh move it together. One that is
    no ``DTensor`` comes as it is.
    """
    if placements is None or not isinstance(gradient, DTensor):
        return gradient
    with torch.no_grad():
        if gradient.placements != placements:
            gradient = gradient.redistribute(placements=placements)
        part: torch.Tensor = gradient.to_local()
    return part


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, row: torch.Tensor, options: _Options) -> torch.Tensor:
        ctx.options, ctx.dtype, ctx.placements = options, row.dtype, placements_of_gradient(x)
        if options.scaled:
            ctx.save_for_backward(row)
        return x.clone() if options.copies else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factors = ctx.saved_tensors[0] if ctx.options.scaled else None
        with torch.no_grad():  # the gradient itself may be differentiated once more, its row not
            part = part_of_gradient(gradient, ctx.placements)
            row = ctx.options.row_of(part, factors).to(ctx.dtype)
        return gradient, row, None
