"""Statistics of parameters, gradients and the like: many tensors in one go."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor

from tmm.core.metrics import KnownMetric, Reduction
from tmm.core.records import Measurement, PackedLayout, Site, Slot
from tmm.kernels.pairs import reduce_pair
from tmm.kernels.summarize.group import summarize_group
from tmm.runtime.eager_functions import reduce_eagerly, reduce_pair_eagerly
from tmm.runtime.key_binding import Binding, KeyRegistry

Select = Callable[[str, torch.dtype], tuple[Reduction, ...]]
"""The reductions of a tensor of that name and dtype."""


Group = tuple[torch.device, Reduction, KnownMetric | None]
"""What tensors have in common that are measured in one go."""

Recognize = Callable[[Reduction, torch.Tensor], KnownMetric | None]
"""The metric that the function of a reduction computes of a tensor, if it is known."""


@dataclass(frozen=True, eq=False)
class Measured:
    """Rows on their way to a collector, and how they are named.

    ``names`` are those of the tensors; ``columns`` are given of rows that are partial sums of each.
    """

    family: str
    group: Group
    binding: Binding
    outputs: tuple[torch.Tensor, ...]
    names: tuple[str, ...]
    columns: tuple[str, ...] = ()

    def squares(self) -> tuple[tuple[str, ...], torch.Tensor] | None:
        """The names of the tensors and the sum of the squares of each; None if rows lack it."""
        if "sum_squares" not in self.columns:
            return None
        rows = self.outputs[0].view(-1, len(self.columns))
        return self.names, rows[:, self.columns.index("sum_squares")]


class NamedStatistics:
    """Reduces sets of named tensors to rows; what belongs to a set is worked out once."""

    def __init__(self, registry: KeyRegistry, known: Recognize) -> None:
        self._registry = registry
        self._known = known
        self._bindings: dict[
            tuple[str, Reduction, KnownMetric | None, tuple[str, ...]], Binding
        ] = {}
        self._groups: dict[Hashable, dict[Group, list[str]]] = {}

    def measure(
        self,
        family: str,
        tensors: Mapping[str, torch.Tensor],
        select: Select,
        chosen: Hashable,
        *,
        reference: Mapping[str, torch.Tensor] | None = None,
    ) -> list[Measured]:
        """Rows of the tensors, in as few kernel launches as can be; waits for no accelerator.

        ``chosen`` is what ``select`` depends on, besides names and dtypes. With ``reference`` rows
        are those of the pairs (see ``tmm.kernels.pairs``).
        """
        dtypes = tuple([tensor.dtype for tensor in tensors.values()])
        devices = tuple([tensor.device for tensor in tensors.values()])
        key = (family, chosen, reference is None, tuple(tensors), dtypes, devices)
        groups = self._groups.get(key)
        if groups is None:
            groups = self._grouped(tensors, select, recognizes=reference is None)
            if all(reduction.function is None for _, reduction, _ in groups):
                self._groups[key] = groups  # a function may be known of some shapes only
        measured = []
        for group, names in groups.items():
            _, reduction, known = group
            values = [dense_part(tensors[name]) for name in names]
            others = None if reference is None else [dense_part(reference[name]) for name in names]
            if known is None and (reduction.function is not None or reduction.is_histogram):
                for index, name in enumerate(names):
                    if others is None:
                        row = reduce_eagerly(values[index], reduction)
                    else:
                        row = reduce_pair_eagerly(values[index], others[index], reduction)
                    own = self._bind(family, reduction, (name,))
                    measured.append(Measured(family, group, own, (row,), (name,)))
                continue
            binding = self._bind(family, reduction, tuple(names), known)
            if others is not None:
                rows = _rows_of_pairs(values, others, reduction)
                columns = reduction.columns
            else:
                columns = (known or reduction).columns
                rows = summarize_group(values, columns)
            outputs = (rows.reshape(-1),)
            measured.append(Measured(family, group, binding, outputs, tuple(names), columns))
        return measured

    def without(self, measured: Measured, names: Container[str]) -> Measured | None:
        """The rows of the other tensors; None if there are none."""
        kept = [place for place, name in enumerate(measured.names) if name not in names]
        if len(kept) == len(measured.names):
            return measured
        if not kept:
            return None
        _, reduction, known = measured.group
        others = tuple(measured.names[place] for place in kept)
        rows = rows_at(measured.outputs[0].view(len(measured.names), -1), kept).reshape(-1)
        binding = self._bind(measured.family, reduction, others, known)
        return replace(measured, binding=binding, outputs=(rows,), names=others)

    def _grouped(
        self, tensors: Mapping[str, torch.Tensor], select: Select, *, recognizes: bool
    ) -> dict[Group, list[str]]:
        groups: dict[Group, list[str]] = {}
        for name, tensor in tensors.items():
            for reduction in select(name, tensor.dtype):
                known = None
                if reduction.function is not None and recognizes:
                    known = self._known(reduction, tensor)
                groups.setdefault((tensor.device, reduction, known), []).append(name)
        return groups

    def _bind(
        self,
        family: str,
        reduction: Reduction,
        names: tuple[str, ...],
        known: KnownMetric | None = None,
    ) -> Binding:
        key = (family, reduction, known, names)
        if key not in self._bindings:
            width = reduction.width if known is None else len(known.columns)
            slots = (
                Slot.of(Measurement(family, Site(name), reduction), place * width, known)
                for place, name in enumerate(names)
            )
            layout = PackedLayout(tuple(slots), 1)
            self._bindings[key] = self._registry.bind(layout, lambda m: m.site)
        return self._bindings[key]


def _rows_of_pairs(
    own: Sequence[torch.Tensor], reference: Sequence[torch.Tensor], reduction: Reduction
) -> torch.Tensor:
    """``tmm.kernels.pairs.reduce_pair`` of many pairs, by grouped kernels."""
    if reduction.is_row_norm:
        pairs = zip(own, reference, strict=True)
        return torch.stack([reduce_pair(a, b, reduction) for a, b in pairs])
    return summarize_group(own, reduction.columns, reference)


def sum_of_squares(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of each tensor, float64, on their common device; shape ``(tensors,)``."""
    return summarize_group([dense_part(tensor) for tensor in tensors], ("sum_squares",))[:, 0]


def rows_at(values: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """``values[places]`` of one place or more, which increase.

    A list of indices would be copied to a device, and waited for.
    """
    starts = [p for i, p in enumerate(places) if i == 0 or places[i - 1] != p - 1]
    ends = [p + 1 for i, p in enumerate(places) if i == len(places) - 1 or places[i + 1] != p + 1]
    return torch.cat([values[start:end] for start, end in zip(starts, ends, strict=True)])


def dense_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor, with all of its elements in memory."""
    if type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.requires_grad:
        return tensor  # as most are
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()  # the rows of all parts are joined
    return tensor if tensor.layout is torch.strided else tensor.to_dense()
