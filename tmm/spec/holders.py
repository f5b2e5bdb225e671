"""Which ranks hold which parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Holders:
    """By the name of a parameter, the ``first`` rank that holds one, and how many do.

    As a rule all ranks hold all; each stage of a pipeline holds its own.
    """

    first: Mapping[str, int] = field(default_factory=dict)
    count: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Sequence[Iterable[str]]) -> Holders:
        """From the names on each rank, in order."""
        first: dict[str, int] = {}
        for rank, own in enumerate(names):
            for name in own:
                first.setdefault(name, rank)
        return cls(first, Counter(name for own in names for name in set(own)))

    def is_elsewhere(self, name: str, rank: int) -> bool:
        """Whether an earlier rank than ``rank``, or none but others, holds a parameter first."""
        return self.first.get(name, rank) != rank

    @property
    def fewest(self) -> int | None:
        """How many ranks hold the parameter that the fewest do; None without parameters."""
        return min(self.count.values(), default=None)

    @property
    def are_single(self) -> bool:
        """Whether no parameter is on two ranks."""
        return max(self.count.values(), default=2) == 1


def strangers(names: Sequence[Iterable[str]]) -> tuple[int, int] | None:
    """Two ranks that both hold parameters, none of them of one name; None if there are none."""
    sets = [(rank, set(own)) for rank, own in enumerate(names)]
    held = [(rank, own) for rank, own in sets if own]
    for rank, own in held[1:]:
        if held[0][1].isdisjoint(own):
            return held[0][0], rank
    return None
