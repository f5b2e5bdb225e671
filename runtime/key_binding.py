"""From the rows of a graph to the keys that they are recorded under."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, KeysView, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tmm.core.families import ACTIVATION_DIFFERENCE, VALUE_FAMILY
from tmm.core.keys import key_of, key_of_metric, parts_of
from tmm.core.metrics import FloatArray, KnownMetric, Reduction
from tmm.core.records import ALONE, LOGGED, KeyInfo, Measurement, PackedLayout, Site, Slot, of_rank
from tmm.runtime.key_owners import KeyOwners, owner_of

_STAGE_BITS = 24  # of a position: as many sites as a stage may have

Resolve = Callable[[Measurement], Site | None]
"""A measurement's site with an absolute name, or None for one that is not to be recorded."""


class SiteNames(tuple[str, ...]):
    """Names of sites, whose hash is computed once: of thousands it takes as long as the rest."""

    _hash: int | None = None

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = super().__hash__()
        return self._hash

    def __getstate__(self) -> None:
        """Nothing: another process has other hashes."""


@dataclass(frozen=True, eq=False)
class RowGroup:
    """Rows of one reduction in one packed output: ``indices`` is (sites, width), sites differ.

    With ``known`` they are rows of that metric, which the reduction's function is.
    """

    reduction: Reduction
    sites: SiteNames
    output: int
    indices: npt.NDArray[np.intp]
    known: KnownMetric | None = None

    @cached_property
    def _piece(self) -> slice | None:
        """Where the rows are if they lie one after the other, as most do; None if not."""
        first = int(self.indices[0, 0])
        piece = range(first, first + self.indices.size)
        is_whole = np.array_equal(self.indices.reshape(-1), piece)
        return slice(piece.start, piece.stop) if is_whole else None

    def rows(self, packed: FloatArray) -> FloatArray:
        """The rows of the reduction, from the packed output, which they may be a view of."""
        piece = self._piece
        rows: FloatArray = (
            packed[self.indices] if piece is None else packed[piece].reshape(self.indices.shape)
        )
        return rows if self.known is None else self.known.rows(self.reduction, rows)


@dataclass(frozen=True)
class WholeOutput:
    """An output that is not packed: all values of one reduction of one site.

    Of a function that is to run eagerly it is the tensor, and ``is_pair`` tells that it is that
    and its counterpart in the reference, one after the other.
    """

    reduction: Reduction
    site: str
    output: int
    is_pair: bool = False


@dataclass(frozen=True, eq=False)
class Binding:
    """A graph's layout with its sites named, as for one of the layers that the graph serves.

    Sites that are ``left_out`` could not be measured in this call, and so not in the whole step:
    their rows of other calls would be those of a part.
    """

    groups: tuple[RowGroup, ...]
    whole: tuple[WholeOutput, ...]
    left_out: tuple[str, ...] = ()


def _whole_name(family: str, site: Site) -> str | None:
    return site.module + site.path


class KeyRegistry:
    """Names sites and keys, and keeps the order in which sites were first executed.

    A key has one owner (see ``owners``): what would have that of another one is not named.
    """

    def __init__(
        self,
        notes: Callable[[str], str] = lambda family: "",
        site_name: Callable[[str, Site], str | None] = _whole_name,
        stage_of: Callable[[str], int] = lambda site: 0,
    ) -> None:
        """``notes`` gives what a store is to keep about the keys of a family.

        ``site_name`` gives the name of a site of a family; None for one that is not recorded.
        ``stage_of`` gives the stage of a pipeline that a site lies in.
        """
        self._notes = notes
        self._site_name = site_name
        self._stage_of = stage_of
        self.owners = KeyOwners()
        self._positions: dict[str, int] = {}
        self._infos: dict[tuple[Reduction, tuple[str, ...]], tuple[KeyInfo, ...]] = {}
        self._keys: dict[int, tuple[tuple[KeyInfo, ...], KeysView[str]]] = {}
        self._logged: dict[tuple[str, str], KeyInfo] = {}
        self._made_of: dict[str, frozenset[str]] = {}
        self.site_notes: dict[str, str] = {}
        self.collected: tuple[Reduction, ...] = ()
        """Functions whose aggregate needs all values, also where only other ranks have some."""

    def note(self, sites: Iterable[str], text: str) -> None:
        """Keep ``text`` about the keys of these sites, from now on.

        What is `ALONE` has other keys from now on, which name the rank.
        """
        new = [site for site in sites if site not in self.site_notes]
        if new:
            self.site_notes |= dict.fromkeys(new, text)
            for known in (self._infos, self._keys, self._logged):
                known.clear()

    def derive(self, key: str, sites: Iterable[str]) -> None:
        """A value that is logged is computed from these sites, whose notes hold for it."""
        self._made_of[key] = frozenset(sites)

    def bind(self, layout: PackedLayout, resolve: Resolve) -> Binding:
        """Name the sites of ``layout``, those that are recorded."""
        rounds: dict[
            tuple[int, Reduction, KnownMetric | None, int], list[tuple[str, Sequence[int]]]
        ] = {}
        turns: Counter[tuple[Reduction, str]] = Counter()
        whole: list[WholeOutput] = []
        for slot in layout.slots:
            family, reduction = slot.measurement.family, slot.measurement.reduction
            found = resolve(slot.measurement)
            site = None if found is None else self.claim(family, found, reduction)
            if site is None:
                continue
            self._position(site)
            if not slot.indices:
                is_pair = family == ACTIVATION_DIFFERENCE.name
                whole.append(WholeOutput(reduction, site, slot.output, is_pair))
                continue
            # A module that is called several times in a graph has several rows: one per round.
            turn = turns[reduction, site]
            turns[reduction, site] += 1
            entry = (site, slot.indices)
            rounds.setdefault((slot.output, reduction, slot.known, turn), []).append(entry)
        groups = tuple(
            RowGroup(
                reduction,
                SiteNames(site for site, _ in entries),
                output,
                np.array([list(span) for _, span in entries], dtype=np.intp),
                known,
            )
            for (output, reduction, known, _), entries in rounds.items()
        )
        return Binding(groups, tuple(whole))

    def claim(self, family: str, site: Site, reduction: Reduction) -> str | None:
        """What the keys of a site begin with; None for one that is not recorded.

        The site's module is named as in patterns. Keys that belong to another owner are refused.
        """
        name = site.module if family == VALUE_FAMILY else self._site_name(family, site)
        if name is None:
            return None
        start = key_of(family, site.named(name))
        keys = (_key(start, metric, reduction) for metric in reduction.metrics)
        return start if self.owners.claim(keys, owner_of(family, site, name), start) else None

    def site(self, family: str, site: Site) -> str | None:
        """The name of what is measured, with its family; None if it is not recorded."""
        name = site.module if family == VALUE_FAMILY else self._site_name(family, site)
        return None if name is None else key_of(family, site.named(name))

    def infos(self, reduction: Reduction, sites: tuple[str, ...]) -> tuple[KeyInfo, ...]:
        """Keys of the metrics of each site; the same object for the same sites."""
        known = self._infos.get((reduction, sites))
        if known is None:
            known = tuple(
                self._info(
                    _key(self._shown(site), metric, reduction), site, reduction.aggregate_name
                )
                for site in sites
                for metric in reduction.metrics
            )
            self._infos[reduction, sites] = known
        return known

    def keys(self, infos: tuple[KeyInfo, ...]) -> KeysView[str]:
        """The keys of what `infos` gave."""
        known = self._keys.get(id(infos))
        if known is None or known[0] is not infos:
            keys = dict.fromkeys(info.key for info in infos).keys()
            known = self._keys[id(infos)] = infos, keys
        return known[1]

    def logged(self, key: str, aggregate: str) -> KeyInfo:
        """The key of a value that the user logs."""
        known = self._logged.get((key, aggregate))
        if known is None:
            made_of = self._made_of.get(key, frozenset()) & self.site_notes.keys()
            of_parts = dict.fromkeys(self.site_notes[site] for site in made_of)
            if ALONE in of_parts:
                self.site_notes.setdefault(key, ALONE)
            info = self._info(self._shown(key), key, aggregate)
            notes = _together(*dict.fromkeys((LOGGED, info.notes, *of_parts)))
            known = replace(info, notes=notes)
            self._logged[key, aggregate] = known
        return known

    def _info(self, key: str, site: str, aggregate: str) -> KeyInfo:
        kind, name = parts_of(self._shown(site))
        position = self._position(site)  # rows that only other ranks have are new here
        notes = _together(self._notes(kind), self.site_notes.get(site, ""))
        return KeyInfo(key, kind, name or site, position, aggregate, notes)

    def _shown(self, site: str) -> str:
        """What the keys of a site begin with."""
        return of_rank(site, 0) if self.site_notes.get(site) == ALONE else site

    def _position(self, site: str) -> int:
        """Where a site comes in the order of execution, stages one after the other."""
        if site not in self._positions:
            self._positions[site] = (self._stage_of(site) << _STAGE_BITS) + len(self._positions)
        return self._positions[site]


def _together(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _key(site: str, metric: str, reduction: Reduction) -> str:
    """The key of a metric; the family of a statistic of attention names it already."""
    return site if reduction.is_of_attention else key_of_metric(site, metric)


def single_row(measurement: Measurement) -> PackedLayout:
    """The layout of one measurement made outside of any graph."""
    return PackedLayout((Slot.of(measurement),), 1)
