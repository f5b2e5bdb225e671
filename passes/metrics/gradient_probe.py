"""An identity that measures the gradient which passes it in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch.distributed.tensor import DTensor

from tmm.core.metrics import COLUMN_SEPARATOR, Reduction
from tmm.kernels.fused.merge_operator import merge_parts
from tmm.kernels.fused.row_partials import partials_of
from tmm.kernels.ops import histogram, summarize
from tmm.kernels.summarize.many import summarize_many
from tmm.passes.graph.sharding import of_gradient
from tmm.passes.metrics.trace import TracedFunction

VERSION = "6"
"""To be changed with what a probe computes: compiled graphs with probes are cached."""

Fused: TypeAlias = tuple[list[int], int, str, bool] | Literal["together"] | None
"""How a row comes about: partials, by what ``partials_of`` takes besides the tensor; ``"together"``
with those of others, by one operator; or by an operator for it alone."""


class Part(NamedTuple):
    """A part of the rows that comes about in a backward pass, for which a stand-in is made.

    Attributes:
        width: Numbers of its row.
        shape: Of what comes back as the stand-in's gradient: partials, or the gradient itself.
        dtype: Of that.
        layout: Of the partials; empty for a gradient.
    """

    width: int
    shape: Sequence[int]
    dtype: torch.dtype
    layout: Sequence[int] = ()


def probe(
    x: torch.Tensor,
    rows: Sequence[torch.Tensor],
    columns: Sequence[str],
    fused: Sequence[Fused],
    copies: bool = False,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x``; in the backward pass the "gradients" of ``rows`` are rows of the gradient of ``x``.

    There is a row of each reduction, which ``columns`` are of (empty for a histogram); where
    ``fused`` says how, the gradient of the row is partials or the gradient of ``x`` itself, and it
    must have their shape. With ``copies`` the result is a copy, for tensors that are overwritten
    later or leave the graph; a ``factor``, of one element, is what the gradient is multiplied with
    before it is measured. The gradient of a ``DTensor`` is measured as it would be placed like the
    tensor, and handed on as it came.
    """
    options = _Options(tuple(columns), tuple(fused), copies)
    result: torch.Tensor = _Probe.apply(x, options, factor, *rows)  # type: ignore[no-untyped-call]
    return result


class FunctionProbe(torch.nn.Module):
    """A probe that also applies traced functions; ``functions`` go with ``columns``."""

    def __init__(
        self,
        columns: Sequence[str],
        fused: Sequence[Fused],
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
    rows: torch.Tensor, parts: Sequence[Part], columns: str
) -> tuple[torch.Tensor, ...]:
    """Stand-ins for ``parts`` of ``rows``; what comes back as their gradients becomes its one.

    All parts are partials, which are merged; or gradients, whose ``columns`` one operator reads.
    """
    given: tuple[torch.Tensor, ...]
    given = _Spread.apply(rows, tuple(parts), columns)  # type: ignore[no-untyped-call]
    return given


@dataclass(frozen=True, eq=False)
class _Options:
    columns: tuple[str, ...]
    fused: tuple[Fused, ...]
    copies: bool
    functions: tuple[TracedFunction | None, ...] = ()

    def rows_of(
        self, gradient: torch.Tensor, factor: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        measured = gradient.values() if gradient.is_nested else gradient
        if factor is not None:
            # Half precision would underflow.
            wide = torch.promote_types(measured.dtype, torch.float32)
            measured = measured.to(wide) * factor.to(wide)
        functions = self.functions or (None,) * len(self.columns)
        rows = []
        for columns, fused, function in zip(self.columns, self.fused, functions, strict=True):
            value = measured
            if function is not None:
                value = function.graph(measured.clone() if function.mutates else measured)
            if fused == "together":
                rows.append(value)
            elif fused is not None:
                rows.append(partials_of(value, *fused))
            else:
                rows.append(summarize(value, columns) if columns else histogram(value))
        return tuple(rows)


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
    def forward(
        ctx: Any,
        x: torch.Tensor,
        options: _Options,
        factor: torch.Tensor | None,
        *rows: torch.Tensor,
    ) -> torch.Tensor:
        ctx.options, ctx.dtypes = options, [row.dtype for row in rows]
        ctx.placements = placements_of_gradient(x)
        if factor is not None:
            ctx.save_for_backward(factor)
        return x.clone() if options.copies else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (factor,) = ctx.saved_tensors or (None,)
        with torch.no_grad():  # the gradient itself may be differentiated once more, its rows not
            part = part_of_gradient(gradient, ctx.placements)
            rows = ctx.options.rows_of(part, factor)
            rows = tuple(row.to(dtype) for row, dtype in zip(rows, ctx.dtypes, strict=True))
        return gradient, None, None, *rows


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, parts: tuple[Part, ...], columns: str
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.parts, ctx.columns = parts, columns
        return tuple(rows.new_zeros((), dtype=part.dtype).expand(*part.shape) for part in parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        pairs = list(zip(gradients, ctx.parts, strict=True))
        came = [(gradient, part) for gradient, part in pairs if gradient is not None]
        if not came:
            return None, None, None
        tensors = [gradient for gradient, _ in came]
        with torch.no_grad():
            if ctx.columns:
                rows = summarize_many(tensors, ctx.columns)
            else:
                rows = merge_parts(tensors, [number for _, part in came for number in part.layout])
            if len(came) < len(pairs):
                # Where the backward pass did not come, a row is of no elements.
                found = iter(rows.split([part.width for _, part in came]))
                rows = torch.cat(
                    [
                        rows.new_zeros(part.width) if gradient is None else next(found)
                        for gradient, part in pairs
                    ]
                )
        return rows, None, None
