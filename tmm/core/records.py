"""What is measured, where it lies and what it is called: the words that every part of tmm shares.

Plain frozen data, so that passes and runtime need not know each other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from tmm.core.families import ACTIVATION, ATTENTION, RCC
from tmm.core.metrics import FloatArray, KnownMetric, Reduction

StepArray: TypeAlias = npt.NDArray[np.int64]

ROOT_NAME = "[root module]"

LOGGED = "logged"
"""The note on keys that somebody logged by hand, and no forward pass measured."""

ALONE = "of this rank alone (rank 0): what the others have differs"
"""The note on keys that are not of the whole batch, though several processes share a training."""

_INPUT_FAMILIES = (RCC.of("x_t"), RCC.of("(x_t-x_0)"))
_INPUT_PATHS = ("/x_t", "/x_t-x_0")

ATTENTION_MARK = " (attention)"
"""What the paths of attentions that have no rows end with."""


@dataclass(frozen=True)
class KeyInfo:
    """What a store keeps about one key besides its values.

    ``kind`` is the family (the part of the key before the first slash), ``site`` names the tensor,
    ``position`` orders keys by execution, ``aggregate`` says how values of several calls and
    micro-batches were joined.
    """

    key: str
    kind: str
    site: str
    position: int
    aggregate: str
    notes: str = ""


@dataclass(frozen=True, eq=False)
class Table:
    """Values of one step for a fixed sequence of keys.

    ``values`` has shape ``(keys,)``, or ``(keys, bins)`` for histograms. A producer that measures
    the same keys on every step passes the same ``infos`` object each time, so that consumers can
    recognise it by identity, and may pass the ``keys`` of these as well.
    """

    infos: tuple[KeyInfo, ...]
    values: FloatArray
    keys: Collection[str] = ()

    def __post_init__(self) -> None:
        if len(self.keys) != len(self.infos):
            object.__setattr__(self, "keys", tuple(info.key for info in self.infos))

    def without(self, keys: Set[str]) -> Table:
        """The table without ``keys``; itself if it has none of them."""
        kept = [place for place, info in enumerate(self.infos) if info.key not in keys]
        if len(kept) == len(self.infos):
            return self
        return Table(tuple(self.infos[place] for place in kept), self.values[kept])


@dataclass(frozen=True)
class Event:
    """Something that happened to the recording itself, such as a gap."""

    step: int
    kind: str
    text: str


@dataclass(frozen=True, eq=False)
class StepRecord:
    """Everything that one finished step recorded. A key occurs at most once in it."""

    step: int
    scalars: tuple[Table, ...] = ()
    histograms: tuple[Table, ...] = ()
    events: tuple[Event, ...] = ()

    def by_key(self) -> dict[str, float | FloatArray]:
        """The number of each key; of a histogram an array of shape ``(bins,)``."""
        values: dict[str, float | FloatArray] = {}
        for table in self.scalars:
            values.update(zip(table.keys, table.values.tolist(), strict=True))
        for table in self.histograms:
            values.update(zip(table.keys, table.values.copy(), strict=True))
        return values

    def extended(self, later: StepRecord) -> StepRecord:
        """This record with the numbers of ``later``, which replace those of the same keys."""
        replaced = {key for table in later.scalars for key in table.keys}
        kept = tuple(table.without(replaced) for table in self.scalars)
        return StepRecord(self.step, (*kept, *later.scalars), self.histograms, later.events)


OUTSIDE = "//"
"""Prefix of the name of a site that does not lie under the module whose frame was traced."""


@dataclass(frozen=True)
class Site:
    """A tensor in a model's forward: an output of a module, or a part of an attention in it.

    ``module`` is the module's dotted name, relative to the module whose frame was traced (empty
    for that module itself); ``path`` locates the tensor in the output, such as ``"[0]"``, or in
    the attention, such as ``".head_0.query"``. ``is_shown`` tells that the program itself shows
    the tensor under that name, by a call; rules are matched on module and path, then. With ``rank``
    it is what that rank alone has of the tensor.
    """

    module: str
    path: str = ""
    is_shown: bool = False
    rank: int | None = None

    def named(self, name: str) -> str:
        """``name``, which is that of the site, with the rank."""
        return name if self.rank is None else of_rank(name, self.rank)


def of_rank(name: str, rank: int) -> str:
    """The name of what a rank has by itself of something."""
    return f"{name}[rank {rank}]"


@dataclass(frozen=True)
class Share:
    """What a rank has of a tensor that several ranks hold together, as with tensor parallel.

    ``kind`` is ``"whole"`` for all of it, or the first of several equal parts, which is the one
    that counts; ``"copy"`` for one that does not count; ``"part"`` for what no other rank has;
    ``"unsummed"`` where the tensor is the sum over ranks; ``"unknown"``, with the ``reason``.
    """

    kind: Literal["whole", "copy", "part", "unsummed", "unknown"]
    reason: str = ""


@dataclass(frozen=True)
class AttentionRequest:
    """What is asked of the attentions that a module calls.

    ``statistics`` are of the distributions over keys, of at most ``queries`` queries, and ``parts``
    of query, key, value and output; ``pooled`` of all heads together.
    """

    statistics: tuple[Reduction, ...]
    parts: tuple[Reduction, ...]
    pooled: bool = False
    queries: int | None = None


@dataclass(frozen=True)
class Measurement:
    """One reduction of one site; ``family`` is the first part of its keys.

    In ``VALUE_FAMILY`` the site's module is the key. Without a ``share`` the ranks of a training
    hold different data.
    """

    family: str
    site: Site
    reduction: Reduction
    share: Share | None = None

    @property
    def is_of_attention(self) -> bool:
        """Whether it is of an attention: of its distributions, or of a tensor inside of it."""
        inside = self.family == ACTIVATION.name and self.site.path.startswith(".")
        return (inside and not self.site.is_shown) or ATTENTION.begins(self.family)

    @property
    def is_of_input(self) -> bool:
        """Whether it is of what a module was given, and not of what it gave."""
        is_normalized = RCC.begins(self.family) and self.site.path.endswith(_INPUT_PATHS)
        return self.family in _INPUT_FAMILIES or is_normalized


@dataclass(frozen=True)
class Slot:
    """Where a measurement lies: at ``indices`` of what a node, or an output, of a graph holds.

    Measurements of one and the same tensor may share them. A reduction that leaves whole has all
    of an ``output`` of its own, and no indices. With ``known`` the numbers are the row of that
    metric, which the user's function of the measurement is.
    """

    measurement: Measurement
    indices: Sequence[int] = ()
    known: KnownMetric | None = None
    output: int = 0

    @staticmethod
    def of(measurement: Measurement, start: int = 0, known: KnownMetric | None = None) -> Slot:
        """The slot of a row that begins at ``start``, or of a reduction that leaves whole."""
        reduction = measurement.reduction
        width = reduction.width if known is None else len(known.columns)
        indices = () if reduction.leaves_whole else range(start, start + width)
        return Slot(measurement, indices, known)

    def at(self, output: int, start: int = 0) -> Slot:
        """The same in an output, in which what holds it begins at ``start``."""
        return replace(self, output=output, indices=tuple(start + index for index in self.indices))


@dataclass(frozen=True)
class PackedLayout:
    """What the extra outputs of a rewritten graph hold.

    ``outputs`` is their number: packed rows, one tensor per device, then tensors that leave whole.
    ``unmeasured`` names sites that have no rows and says why.
    """

    slots: tuple[Slot, ...]
    outputs: int
    unmeasured: tuple[tuple[Site, str], ...] = ()
