"""Where the values of a run go besides its files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import TypeAlias

from tmm.gaps import MonitoringWarning
from tmm.layout import StepRecord

Sink: TypeAlias = Callable[[int, Mapping[str, float]], None]
"""Takes a step and the numbers that it recorded, by key; called in the thread of the writer."""

GROUP = "tmm.sinks"
"""The group of the entry points by which packages offer sinks."""


def find_sinks(sinks: Iterable[Sink | str]) -> dict[str, Sink]:
    """The sinks by name; texts are names of entry points, which are called to make one.

    One that cannot be loaded is warned of and left out. Raises ``ValueError`` for a name that no
    package offers, and ``TypeError`` for what is neither text nor a function.
    """
    found: dict[str, Sink] = {}
    for sink in sinks:
        if callable(sink):
            found[getattr(sink, "__qualname__", type(sink).__qualname__)] = sink
            continue
        if not isinstance(sink, str):
            raise TypeError(f"sinks: {sink!r} is neither a function nor the name of one")
        offered = {point.name: point for point in entry_points(group=GROUP)}
        if sink not in offered:
            known = ", ".join(sorted(offered)) or "none"
            raise ValueError(f"sinks: {sink!r} is offered by no package (known: {known})")
        if (made := _made(offered[sink])) is not None:
            found[sink] = made
    return found


class Sinks:
    """Hands each record to several sinks; one that fails is warned of once, and left out."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = dict(sinks)

    def take(self, record: StepRecord) -> None:
        """Hand over the numbers of a step."""
        if not self._sinks:
            return
        values: dict[str, float] = {}
        for table in record.scalars:
            keys = (info.key for info in table.infos)
            values.update(zip(keys, table.values.tolist(), strict=True))
        for name, sink in list(self._sinks.items()):
            try:
                sink(record.step, dict(values))
            except Exception as error:
                del self._sinks[name]
                _warn(f"the sink {name} failed at step {record.step} and gets nothing more", error)


def _made(point: EntryPoint) -> Sink | None:
    try:
        sink: Sink = point.load()()
    except Exception as error:
        _warn(f"the sink {point.name} of {point.value} cannot be made", error)
        return None
    return sink


def _warn(what: str, error: Exception) -> None:
    text = f"{what}: {type(error).__name__}: {error}"
    warnings.warn(text, MonitoringWarning, stacklevel=3)
