"""An identity that measures the gradient which passes it in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from tmm.core.metrics import COLUMN_SEPARATOR, Reduction
from tmm.kernels.dense import packed_dtype
from tmm.kernels.fused.merge_operator import merge
from tmm.kernels.fused.row_partials import layout_of_row, partials_of
from tmm.kernels.ops import histogram, summarize
from tmm.passes.metrics.trace import TracedFunction

VERSION = "4"
"""To be changed with what a probe computes: compiled graphs with probes are cached."""

Fused: TypeAlias = tuple[list[int], int, str, bool]
"""What ``partials_of`` takes besides a tensor, as a graph holds it."""


def probe(
    x: torch.Tensor,
    rows: Sequence[torch.Tensor],
    columns: Sequence[str],
    fused: Sequence[Fused | None],
    copies: bool = False,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x``; in the backward pass the "gradients" of ``rows`` are rows of the gradient of ``x``.

    There is a row of each reduction, which ``columns`` are of (empty for a histogram); where
    ``fused`` says how, the gradient of the row is partials, and it must have their shape. With
    ``copies`` the result is a copy, for tensors that are overwritten later or leave the graph; a
    ``factor``, of one element, is what the gradient is multiplied with before it is measured.
    """
    options = _Options(tuple(columns), tuple(fused), copies)
    result: torch.Tensor = _Probe.apply(x, options, factor, *rows)  # type: ignore[no-untyped-call]
    return result


class FunctionProbe(torch.nn.Module):
    """A probe that also applies traced functions; ``functions`` go with ``columns``."""

    def __init__(
        self,
        columns: Sequence[str],
        fused: Sequence[Fused | None],
        functions: Sequence[TracedFunction | None],
        *,
        copies: bool,
    ) -> None:
        super().__init__()
        self.options = _Options(tuple(columns), tuple(fused), copies, tuple(functions))

    def forward(
        self, x: torch.Tensor, rows: Sequence[torch.Tensor], factor: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As ``probe``."""
        result: torch.Tensor
        result = _Probe.apply(x, self.options, factor, *rows)  # type: ignore[no-untyped-call]
        return result


def columns_of(reduction: Reduction) -> str:
    """The columns of a reduction as a probe takes them."""
    return COLUMN_SEPARATOR.join(reduction.columns)


def spread_rows(
    rows: torch.Tensor, widths: Sequence[int], fused: Sequence[tuple[list[int], list[int], bool]]
) -> tuple[torch.Tensor, ...]:
    """Stand-ins for parts of ``rows``; what comes back as their gradients is merged into its one.

    A part has one of the ``widths``; or it becomes of partials, and ``fused`` holds their layout,
    shape, and whether they are float64; the layout of others is empty.
    """
    parts: tuple[torch.Tensor, ...]
    parts = _Spread.apply(rows, tuple(widths), tuple(fused))  # type: ignore[no-untyped-call]
    return parts


@dataclass(frozen=True, eq=False)
class _Options:
    columns: tuple[str, ...]
    fused: tuple[Fused | None, ...]
    copies: bool
    functions: tuple[TracedFunction | None, ...] = ()

    def rows_of(
        self, gradient: torch.Tensor, factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        measured = gradient
        if factor is not None:
            # Half precision would underflow.
            wide = torch.promote_types(gradient.dtype, torch.float32)
            measured = gradient.to(wide) * factor.to(wide)
        functions = self.functions or (None,) * len(self.columns)
        rows = []
        for columns, fused, function in zip(self.columns, self.fused, functions, strict=True):
            value = measured
            if function is not None:
                value = function.graph(measured.clone() if function.mutates else measured)
            if fused is not None:
                rows.append(partials_of(value, *fused))
            else:
                rows.append(summarize(value, columns) if columns else histogram(value))
        return tuple(rows)


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        options: _Options,
        factor: torch.Tensor | None,
        *rows: torch.Tensor,
    ) -> torch.Tensor:
        ctx.options, ctx.dtypes = options, [row.dtype for row in rows]
        if factor is not None:
            ctx.save_for_backward(factor)
        return x.clone() if options.copies else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = ctx.saved_tensors or (None,)
        with torch.no_grad():  # the gradient itself may be differentiated once more, its rows not
            rows = ctx.options.rows_of(gradient, factor)
            rows = tuple(row.to(dtype) for row, dtype in zip(rows, ctx.dtypes, strict=True))
        return gradient, None, None, *rows


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        widths: tuple[int, ...],
        fused: tuple[tuple[list[int], list[int], bool], ...],
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.widths, ctx.layouts = widths, [layout for layout, _, _ in fused]
        parts = []
        for width, (layout, shape, is_wide) in zip(widths, fused, strict=True):
            dtype = (torch.float64 if is_wide else torch.float32) if layout else rows.dtype
            nothing = rows.new_zeros((), dtype=dtype)
            parts.append(nothing.expand(*shape) if layout else nothing.expand(width))
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        given = [gradient for gradient in gradients if gradient is not None]
        if not given:
            return None, None, None
        parts, layouts = [], []
        for gradient, width, layout in zip(gradients, ctx.widths, ctx.layouts, strict=True):
            if gradient is None:  # the backward pass did not come here: a row of no elements
                parts.append(given[0].new_zeros(width, dtype=packed_dtype(given[0].device)))
                layouts += layout_of_row(width)
            else:
                parts.append(gradient)
                layouts += layout or layout_of_row(width)
        with torch.no_grad():
            return merge(parts, layouts), None, None
