"""Where the values of a run go besides its files."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeAlias, runtime_checkable

from tmm.core.failures import UserLine, words
from tmm.core.metrics import FloatArray
from tmm.core.records import StepRecord
from tmm.runs.state import Status

Value: TypeAlias = float | FloatArray

Sink: TypeAlias = Callable[[int, Mapping[str, Value]], None]
"""Takes a step and what it recorded, by key: numbers, and histograms as arrays of shape (bins,)
whose edges are ``tmm.HISTOGRAM_EDGES``. Steps increase; one that is recorded again, or to which
values are added after its end, comes again, as a whole."""

GROUP = "tmm.sinks"
"""The group of the entry points by which packages offer sinks."""

_CAPACITY = 1024  # steps that wait for one sink
_CLOSE_SECONDS = 60.0  # that the end of a run waits for all of them


@dataclass(frozen=True)
class RunInfo:
    """The run whose values a sink takes.

    ``config`` is what JSON can hold. ``first_step`` is the step that is open when the run starts,
    or goes on (``resumed``): then steps may come again that were recorded before, up to
    ``last_step``, which is None as long as there are none.
    """

    path: Path
    id: str
    project: str
    name: str
    config: Mapping[str, Any]
    tags: tuple[str, ...] = ()
    notes: str = ""
    first_step: int = 0
    resumed: bool = False
    last_step: int | None = None

    @property
    def repeats_steps(self) -> bool:
        """Whether steps come again that were recorded before."""
        return self.last_step is not None and self.first_step <= self.last_step


class OpenSink(Protocol):
    """A sink that wants to know when its run ends, and how."""

    def __call__(self, step: int, values: Mapping[str, Value], /) -> None:
        """Take a step, as any ``Sink`` does."""

    def close(self, status: Status) -> None:
        """Write what is left; ``status`` is that of the run."""


@runtime_checkable
class RunSink(Protocol):
    """Makes the sink of one run."""

    def open(self, run: RunInfo) -> OpenSink:
        """Start to take the values of ``run``; called when it starts, by the thread that does."""


NamedSink: TypeAlias = tuple[str, "Sink | RunSink"]


def find_sinks(sinks: Iterable[Sink | RunSink | str]) -> tuple[NamedSink, ...]:
    """The sinks with their names; texts are names of entry points, which are called to make one.

    One that cannot be loaded is warned of and left out. Raises ``ValueError`` for a name that no
    package offers, and ``TypeError`` for what is neither text nor a sink.
    """
    if isinstance(sinks, str) or not isinstance(sinks, Iterable):
        raise TypeError(f"sinks={sinks!r} is not a list of sinks; give one: [{sinks!r}]")
    found: list[NamedSink] = []
    for sink in sinks:
        if isinstance(sink, type):
            raise TypeError(f"sinks: {sink.__name__} is a class; give what it makes")
        if isinstance(sink, RunSink) or callable(sink):
            found.append((getattr(sink, "__qualname__", type(sink).__qualname__), sink))
            continue
        if not isinstance(sink, str):
            raise TypeError(f"sinks: {sink!r} is neither a function nor the name of one")
        offered = {point.name: point for point in entry_points(group=GROUP)}
        if sink not in offered:
            known = ", ".join(sorted(offered)) or "none"
            raise ValueError(f"sinks: {sink!r} is offered by no package (known: {known})")
        if (made := _made(offered[sink])) is not None:
            found.append((sink, made))
    return tuple(found)


class Sinks:
    """Hands the steps of a run to its sinks, each in a thread of its own.

    Nobody waits for a sink: where ``capacity`` steps wait for one, further ones are left out. One
    that raises is warned of once and gets nothing more.
    """

    def __init__(
        self, sinks: Iterable[NamedSink], run: RunInfo, *, capacity: int = _CAPACITY
    ) -> None:
        self._deliveries = [
            _Delivery(name, opened, capacity)
            for name, sink in sinks
            if (opened := _opened(name, sink, run)) is not None
        ]

    def take(self, record: StepRecord) -> None:
        """Hand over what a step recorded; returns at once."""
        for delivery in self._deliveries:
            delivery.take(record)

    def close(self, status: Status, *, seconds: float = _CLOSE_SECONDS) -> None:
        """Let the sinks take what waits, and close them; gives up after ``seconds``."""
        until = time.monotonic() + seconds
        for delivery in self._deliveries:
            delivery.end(status)
        for delivery in self._deliveries:
            delivery.wait(until, seconds)
        self._deliveries = []


class _Delivery:
    """One sink, its thread, and the steps that wait for it."""

    def __init__(self, name: str, sink: Sink | OpenSink, capacity: int) -> None:
        self._name, self._sink, self._capacity = name, sink, capacity
        self._waiting: SimpleQueue[StepRecord | None] = SimpleQueue()  # None comes last
        self._status: Status = "finished"
        self._has_failed = False
        self._left_out = 0
        self._warn = UserLine.here().warn  # the line that starts the run, for a thread has none
        self._thread = threading.Thread(target=self._run, name=f"tmm sink {name}", daemon=True)
        self._thread.start()

    def take(self, record: StepRecord) -> None:
        if self._has_failed or not (record.scalars or record.histograms):
            return
        if self._waiting.qsize() < self._capacity:
            self._waiting.put(record)
            return
        self._left_out += 1
        if self._left_out == 1:
            self._warn(
                f"the sink {self._name} is slower than the training: {self._capacity} steps wait"
                f" for it, and step {record.step} and others are left out"
            )

    def end(self, status: Status) -> None:
        self._status = status
        self._waiting.put(None)

    def wait(self, until: float, seconds: float) -> None:
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._warn(
                f"the sink {self._name} was not done {seconds:.0f} s after the end of the run;"
                f" {self._waiting.qsize()} steps wait for it"
            )
        elif self._left_out and not self._has_failed:
            self._warn(f"the sink {self._name} was slow and misses {self._left_out} steps")

    def _run(self) -> None:
        while (record := self._waiting.get()) is not None:
            if self._has_failed:
                continue
            try:
                self._sink(record.step, record.by_key())
            except BaseException as error:  # in a thread of its own, SystemExit ends nothing else
                self._fail(f"failed at step {record.step} and gets nothing more", error)
        close = getattr(self._sink, "close", None)
        if close is not None:
            try:
                close(self._status)
            except BaseException as error:  # as above
                self._fail("could not be closed", error)

    def _fail(self, what: str, error: BaseException) -> None:
        if not self._has_failed:  # what follows from a failure is not told
            self._has_failed = True
            self._warn(f"the sink {self._name} {what}: {words(error)}")


def _made(point: EntryPoint) -> Sink | RunSink | None:
    try:
        sink: Sink | RunSink = point.load()()
    except (Exception, SystemExit) as error:
        UserLine.here().warn(
            f"the sink {point.name} of {point.value} cannot be made: {words(error)}"
        )
        return None
    return sink


def _opened(name: str, sink: Sink | RunSink, run: RunInfo) -> Sink | OpenSink | None:
    if not isinstance(sink, RunSink):
        return sink
    try:
        return sink.open(run)
    except (Exception, SystemExit) as error:
        UserLine.here().warn(f"the sink {name} cannot be opened and gets nothing: {words(error)}")
        return None
