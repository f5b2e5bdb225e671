"""The names in the stages of a pipeline, as ranks tell each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tmm.core.records import ROOT_NAME

APART = "stages"
"""What names begin with where stages have equal ones, as if they lay in a list of that name."""


@dataclass(frozen=True)
class StageNames:
    """What a stage holds, as other ranks are told: names, and lines that tell models apart.

    ``kinds`` are the types of the modules; ``parameters`` are names, with that of the module that
    each belongs to, and have so many ``elements`` together.
    """

    index: int
    modules: tuple[str, ...]
    kinds: tuple[str, ...]
    parameters: tuple[tuple[str, str], ...]
    lines: tuple[str, ...] = ()
    elements: int = 0

    def apart(self) -> StageNames:
        """The same with names that no other stage has."""
        parameters = (
            (within(self.index, name), within(self.index, plain(owner)))
            for name, owner in self.parameters
        )
        modules = tuple(within(self.index, name) for name in self.modules)
        return replace(self, modules=modules, parameters=tuple(parameters))


def within(index: int, name: str) -> str:
    """A name that no other stage has."""
    return f"{APART}.{index}.{name}" if name else f"{APART}.{index}"


def plain(name: str) -> str:
    """The name of a module that is displayed."""
    return "" if name == ROOT_NAME else name


def have_other_names(stages: Sequence[StageNames]) -> bool:
    """Whether names are not those of one model: something else has the same one in two stages."""
    counts = Counter(name for stage in stages for name, _ in stage.parameters)
    kinds: dict[str, str] = {}
    named = (pair for stage in stages for pair in zip(stage.modules, stage.kinds, strict=True))
    # Stages may be of different classes.
    differ = any(kinds.setdefault(name, kind) != kind for name, kind in named if name)
    return differ or any(count > 1 for count in counts.values())


def cut_in(stages: Sequence[StageNames], last: int) -> frozenset[tuple[int, str]]:
    """Stages with the names of modules that lie in a later one, too, and hold parameters."""
    around: dict[str, int] = {}  # the last stage that has parameters in a module of that name
    for stage in stages:
        for name, _ in stage.parameters:
            parts = name.split(".")
            for depth in range(len(parts)):
                around[".".join(parts[:depth])] = stage.index
    around[""] = last
    return frozenset(
        (stage.index, name)
        for stage in stages
        for name in stage.modules
        if stage.index != around.get(name, stage.index)
    )
