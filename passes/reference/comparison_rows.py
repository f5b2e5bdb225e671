"""Which rows compare a module with the reference: decided here, computed in graphs and outside."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from tmm.core.families import ACTIVATION_DIFFERENCE, RCC
from tmm.core.metrics import Reduction
from tmm.core.records import Measurement, Site
from tmm.kernels.pairs import ROW_NORM, Normalization, normalized_norms, norms_without, reduce_pair
from tmm.passes.request import CheckedModule

UPDATE_TERM = RCC.of("(W_t-W_0)x_t")
INPUT_TERM = RCC.of("W_0(x_t-x_0)")
INPUT = RCC.of("x_t")
INPUT_DIFFERENCE = RCC.of("(x_t-x_0)")

Operand: TypeAlias = Literal["live", "mixed", "reference", "bias", "reference bias"]
"""A tensor of the program; what the module makes of the live input with the reference's parameters;
the counterpart in the reference; the bias of the module; and that of the reference."""


@dataclass(frozen=True)
class Computation:
    """What is computed of the operands of a term; equal ones compute the same."""

    reduction: Reduction
    is_pair: bool
    normalization: Normalization | None = None

    def __call__(self, own: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        """The row. Works eagerly and while a graph is traced."""
        if self.normalization is not None:
            return normalized_norms(self.normalization, own, *others)
        if not self.is_pair:
            return norms_without(own, *others)
        reference, *offsets = others
        if offsets:
            own, reference = own - offsets[0].detach(), reference - offsets[1]
        return reduce_pair(own, reference, self.reduction)


@dataclass(frozen=True)
class Term:
    """A row: of ``left``, or of the difference of ``left`` and ``right``.

    ``offsets`` are subtracted first, one from each; with a ``normalization`` both are normalized.
    """

    family: str
    site: Site
    reduction: Reduction
    left: Operand
    right: Operand | None = None
    offsets: tuple[Operand, ...] = ()
    normalization: Normalization | None = None

    @property
    def measurement(self) -> Measurement:
        """What the row is of."""
        return Measurement(self.family, self.site, self.reduction)

    @property
    def operands(self) -> tuple[Operand, ...]:
        """The arguments of the computation."""
        right = () if self.right is None else (self.right,)
        return (self.left, *right, *self.offsets)

    @property
    def computation(self) -> Computation:
        """What is computed of the operands."""
        return Computation(self.reduction, self.right is not None, self.normalization)

    def given(self, known: Collection[Operand]) -> Term:
        """The term where these operands are known: without offsets, unless all of them are."""
        return self if {*self.offsets} <= {*known} else replace(self, offsets=())


def comparison_rows(
    site: Site,
    reductions: Collection[Reduction] = (),
    checked: CheckedModule | None = None,
) -> tuple[Term, ...]:
    """The rows of an output of a module: its difference, then the refined coordinate check."""
    differences = (
        Term(ACTIVATION_DIFFERENCE.name, site, reduction, "live", "reference")
        for reduction in reductions
    )
    return (*differences, *(() if checked is None else _check(site, checked)))


def input_rows(name: str, checked: CheckedModule) -> tuple[Term, ...]:
    """The rows of the input of a module that the refined coordinate check asks for."""
    if checked.only_update:
        return ()
    site, way = Site(name), checked.normalization
    rows = (
        Term(INPUT, site, ROW_NORM, "live"),
        Term(INPUT_DIFFERENCE, site, ROW_NORM, "live", "reference"),
    )
    if way is None:
        return rows
    own, change = Site(name, ".weight/x_t"), Site(name, ".weight/x_t-x_0")
    return (
        *rows,
        Term(UPDATE_TERM, own, ROW_NORM, "live", normalization=way),
        Term(INPUT_TERM, change, ROW_NORM, "live", "reference", normalization=way),
    )


def _check(site: Site, checked: CheckedModule) -> Iterator[Term]:
    def row(family: str, path: str, left: Operand, right: Operand | None, *less: Operand) -> Term:
        place = Site(site.module, site.path + path)
        return Term(family, place, ROW_NORM, left, right, less)

    yield row(UPDATE_TERM, "", "live", "mixed")
    if checked.has_weight_rows:
        yield row(UPDATE_TERM, ".weight", "live", "mixed", "bias", "reference bias")
    if not checked.only_update:
        yield row(INPUT_TERM, "", "mixed", "reference")
        if checked.has_weight_rows:  # the bias is the same on both sides
            yield row(INPUT_TERM, ".weight", "mixed", "reference")
    if checked.has_operand_rows:
        yield row(UPDATE_TERM, ".weight/W_t x_t", "live", None, "bias")
        yield row(INPUT_TERM, ".weight/W_0 x_0", "reference", None, "reference bias")
