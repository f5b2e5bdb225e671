"""Compares what several ranks hold, and one of them measures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from tmm.core.keys import key_of
from tmm.kernels.dense import on_device
from tmm.runtime.grouped_statistics import dense_part, rows_at, sum_of_squares
from tmm.runtime.key_binding import Binding
from tmm.runtime.ranks.replica_rows import binding_of, numbers_of, rows_of
from tmm.runtime.step_collector import StepCollector
from tmm.spec.ranks import Ranks, is_distributed

Names = tuple[str, ...]
Numbers = tuple[Names, torch.Tensor]


class Replicas:
    """Has ranks compare tensors, by one number of each, with the rows that they join anyway."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._bindings: dict[tuple[str, Names], Binding] = {}
        self._counts: dict[tuple[Names, torch.device], torch.Tensor] = {}

    @property
    def is_needed(self) -> bool:
        """Whether nothing in the model keeps what ranks hold equal."""
        return self._ranks.size > 1 and not self._ranks.averages

    def numbers(
        self, tensors: Mapping[str, torch.Tensor], squares: Sequence[Numbers]
    ) -> Iterator[Numbers]:
        """What is equal on ranks that hold the same; some of the sums of squares are known."""
        if self._ranks.size == 1:
            return
        plain = {name: tensor for name, tensor in tensors.items() if not is_distributed(tensor)}
        known = {name for names, _ in squares for name in names}
        others = {name: tensor for name, tensor in plain.items() if name not in known}
        for names, values in (*squares, *squares_of(others)):
            places = [place for place, name in enumerate(names) if name in plain]
            if places:
                held = tuple(names[place] for place in places)
                yield (
                    held,
                    numbers_of([dense_part(plain[n]) for n in held], rows_at(values, places)),
                )

    def add(
        self,
        collector: StepCollector,
        family: str,
        names: Names,
        numbers: torch.Tensor,
        unless: torch.Tensor | None = None,
    ) -> None:
        """Send the numbers of tensors, which the keys of ``family`` are of."""
        if (family, names) not in self._bindings:
            self._bindings[family, names] = binding_of([key_of(family, name) for name in names])
        rows = rows_of(numbers, self._expected(names, numbers))
        collector.add(self._bindings[family, names], (rows,), unless=unless)

    def _expected(self, names: Names, numbers: torch.Tensor) -> int | torch.Tensor:
        """On how many ranks the numbers are to be known; one element of each, where they differ."""
        if self._ranks.averages:
            return 1
        count, size = self._ranks.holders.count, self._ranks.size
        counts = [count.get(name, size) for name in names]
        if len(set(counts)) == 1:
            return counts[0]
        key = names, numbers.device
        if key not in self._counts:
            own = torch.tensor(counts, dtype=numbers.dtype, device="cpu")
            self._counts[key] = on_device(own, numbers.device)
        return self._counts[key]


def squares_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[Numbers]:
    """The sums of the squares of tensors, those of a device together."""
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    for names in by_device.values():
        yield tuple(names), sum_of_squares([tensors[name] for name in names])
