"""What keeps a step from being recorded, and how often that has happened."""

from __future__ import annotations

import warnings
from typing import Literal, TypeAlias

from tmm.layout import Event

OnError: TypeAlias = Literal["raise", "warn"]

CALL_THE_MODEL = (
    "Call the object that tmm.instrument gave back. If it is called inside a function or module"
    " that is compiled itself, instrument that: tmm.instrument(torch.compile(step), spec,"
    " module=model)"
)

_FAILURES_UNTIL_SILENT = 3  # in a row; each may cost a compilation


class MonitoringWarning(UserWarning):
    """Monitoring failed on a step; the training goes on without it."""


class Gaps:
    """The steps of a run that were not recorded.

    A fault of the monitoring is raised until a first step has been recorded, unless ``on_error`` is
    "warn"; afterwards it is warned of, once for faults in a row.
    """

    def __init__(self, on_error: OnError) -> None:
        self.has_recorded = False
        self._on_error = on_error
        self._failures = 0
        self._missed_forward = False
        self._events: list[Event] = []

    @property
    def are_raised(self) -> bool:
        """Whether a fault is to end the forward pass."""
        return not self.has_recorded and self._on_error == "raise"

    @property
    def are_certain(self) -> bool:
        """Whether so many steps have failed in a row that the next one is not tried."""
        return self._failures >= _FAILURES_UNTIL_SILENT

    def close(self) -> None:
        """A step was recorded."""
        self.has_recorded, self._failures = True, 0

    def take_events(self) -> tuple[Event, ...]:
        """What was not handed out yet."""
        events, self._events = tuple(self._events), []
        return events

    def add(self, step: int, reason: str) -> None:
        """A step is not recorded."""
        self._events.append(Event(step, "gap", reason))

    def add_failure(self, step: int, error: Exception) -> None:
        """A step is not recorded because monitoring failed; warns of the first one in a row."""
        self._failures += 1
        self.add(step, f"monitoring failed: {type(error).__name__}: {error}")
        if self._failures == 1:
            warnings.warn(
                f"monitoring failed on step {step}, which is not recorded; the training goes on."
                f" {type(error).__name__}: {error}",
                MonitoringWarning,
                stacklevel=4,
            )

    def warn_of_silent(self, text: str | None) -> None:
        """Warn of matched modules without rows, where there is something to say."""
        if text is not None:
            warnings.warn(text, MonitoringWarning, stacklevel=4)

    def warn_of_missed_forward(self, step: int, hint: str) -> None:
        """Warn, once, that no forward pass ran in a monitored step, and what to do."""
        if not self._missed_forward:
            self._missed_forward = True
            warnings.warn(
                f"no forward pass of the instrumented model ran in the monitored step {step}, so"
                f" that nothing of one was measured. {hint}",
                MonitoringWarning,
                stacklevel=4,
            )
