"""Rows that are computed one by one, joined to one tensor per device as a graph hands them out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tmm.core.metrics import COLUMN_SEPARATOR, Reduction
from tmm.core.records import Measurement, PackedLayout, Slot
from tmm.kernels.ops import pack, summarize
from tmm.runtime.eager_functions import FunctionCalls, reduce_eagerly
from tmm.runtime.key_binding import Binding

_MOST_SEQUENCES = 64
"""Sequences of rows whose layout is kept; a model that takes other ways each time has many."""


class Wanted:
    """One measurement, with what its row is computed by. The same object each time it is made."""

    __slots__ = ("calls", "columns", "measurement", "reduction")

    def __init__(self, measurement: Measurement) -> None:
        self.measurement = measurement
        self.reduction: Reduction = measurement.reduction
        is_plain = self.reduction.function is None and not self.reduction.is_histogram
        self.columns = COLUMN_SEPARATOR.join(self.reduction.columns) if is_plain else ""
        self.calls = FunctionCalls() if self.reduction.function is not None else None

    def row(self, tensor: torch.Tensor) -> torch.Tensor:
        """The row of a tensor without gradients, or all of it where it leaves whole."""
        if self.columns:
            return summarize(tensor, self.columns)
        if self.calls is not None and self.reduction.trace:
            # The function may change its argument in place.
            return self.calls.apply(self.reduction, tensor.clone())
        return reduce_eagerly(tensor, self.reduction)


Rows = list[tuple[Wanted, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class _Packing:
    """``packed`` are the rows that join to one tensor each, ``whole`` those that stay alone."""

    binding: Binding
    packed: tuple[tuple[int, ...], ...]
    whole: tuple[int, ...]


class RowPacker:
    """Joins the rows of a pass. The same measurements in the same order have one layout."""

    def __init__(self, bind: Callable[[PackedLayout], Binding]) -> None:
        self._bind = bind
        self._known: dict[tuple[object, ...], _Packing] = {}

    def pack(self, rows: Rows) -> tuple[Binding, list[torch.Tensor]]:
        """The rows as the extra outputs of a graph, and what they are."""
        wanted = tuple(one for one, _ in rows)
        devices = tuple(row.device for _, row in rows)
        key = (wanted, devices if len(set(devices)) > 1 else None)
        packing = self._known.get(key)
        if packing is None:
            if len(self._known) >= _MOST_SEQUENCES:
                self._known.clear()
            packing = self._known[key] = self._packing(wanted, devices)
        outputs = [pack([rows[index][1] for index in indices]) for indices in packing.packed]
        outputs += [rows[index][1] for index in packing.whole]
        return packing.binding, outputs

    def _packing(self, wanted: Sequence[Wanted], devices: Sequence[torch.device]) -> _Packing:
        packed: dict[torch.device, list[int]] = {}
        whole: list[int] = []
        for index, (one, device) in enumerate(zip(wanted, devices, strict=True)):
            place = whole if one.reduction.leaves_whole else packed.setdefault(device, [])
            place.append(index)
        layout: dict[int, Slot] = {}
        for output, indices in enumerate(packed.values()):
            # Rows of one reduction lie one after the other: nobody need gather them.
            order: dict[Reduction, int] = {}
            for index in indices:
                order.setdefault(wanted[index].reduction, len(order))
            indices.sort(key=lambda index: order[wanted[index].reduction])
            start = 0
            for index in indices:
                layout[index] = Slot.of(wanted[index].measurement, start).at(output)
                start += wanted[index].reduction.width
        for output, index in enumerate(whole, len(packed)):
            layout[index] = Slot.of(wanted[index].measurement).at(output)
        slots = tuple(layout[index] for index in range(len(wanted)))
        binding = self._bind(PackedLayout(slots, len(packed) + len(whole)))
        return _Packing(binding, tuple(map(tuple, packed.values())), tuple(whole))
