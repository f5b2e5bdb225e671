"""``with monitor.step(n):`` as an object, which notices where somebody leaves out ``with``."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from tmm.runtime.step_collector import StepCollector


class HasBlocks(Protocol):
    """What opens and ends the steps of blocks; a ``Monitor``."""

    def enter(self, block: StepBlock) -> bool:
        """A block begins; tells whether its step is monitored."""

    def leave(self, block: StepBlock, error: BaseException | None) -> None:
        """A block ends, by ``error`` or as it should."""


class StepBlock:
    """Opens a step where it is entered, and ends it where it is left.

    ``collector`` gathers its step while it is open. ``is_nested`` tells that another one's was open
    already, so that it has none.
    """

    def __init__(self, monitor: HasBlocks, step: int) -> None:
        self.step = step
        self.was_entered = False
        self.is_nested = False
        self.collector: StepCollector | None = None
        self._monitor = monitor

    def __enter__(self) -> bool:
        self.was_entered = True
        return self._monitor.enter(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._monitor.leave(self, error)
