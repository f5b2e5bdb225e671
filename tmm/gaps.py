"""What keeps a step from being recorded, and how often that has happened."""

from __future__ import annotations

import sys
import warnings
from typing import Literal, TypeAlias

from tmm.layout import Event

OnError: TypeAlias = Literal["raise", "warn"]

CALL_THE_MODEL = (
    "Call the object that tmm.instrument gave back. If it is called inside a function or module"
    " that is compiled itself, instrument that: tmm.instrument(torch.compile(step), spec,"
    " module=model)"
)

FAULT_OF_COMPILING = (
    "tmm: this was raised while the program of the monitored steps was compiled. If the model"
    " compiles without monitoring, tmm.instrument(..., on_error='warn') lets such a step run the"
    " user's own program, unrecorded, and tmm.remove(model) takes the monitoring off"
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
        self._told: set[str] = set()
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

    def give_back(self, events: tuple[Event, ...]) -> None:
        """Hand these out once more: the step that took them is not recorded."""
        self._events[:0] = events

    def add(self, step: int, reason: str) -> None:
        """A step is not recorded."""
        self._events.append(Event(step, "gap", reason))

    def add_failure(self, step: int, error: Exception) -> None:
        """A step is not recorded because monitoring failed; warns of the first one in a row."""
        self._failures += 1
        self.add(step, f"monitoring failed: {words(error)}")
        if self._failures == 1:
            warnings.warn(
                f"monitoring failed on step {step}, which is not recorded; the training goes on."
                f" {words(error)}",
                MonitoringWarning,
                stacklevel=levels_to_user(),
            )

    def warn_of_silent(self, text: str | None) -> None:
        """Warn of matched modules without rows, where there is something to say."""
        if text is not None:
            warnings.warn(text, MonitoringWarning, stacklevel=levels_to_user())

    def warn_of_missed_forward(self, step: int, hint: str) -> None:
        """Warn, once, that no forward pass ran in a monitored step, and what to do."""
        if not self._missed_forward:
            self._missed_forward = True
            warnings.warn(
                f"no forward pass of the instrumented model ran in the monitored step {step}, so"
                f" that nothing of one was measured. {hint}",
                MonitoringWarning,
                stacklevel=levels_to_user(),
            )

    def warn_once(self, kind: str, text: str) -> None:
        """Warn, once of a kind, of what leaves rows out or makes them less than they seem."""
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(text, MonitoringWarning, stacklevel=levels_to_user())

    def warn_of_foreign_pass(self, step: int, foreign: str) -> None:
        """Warn that a forward pass was traced or transformed instead of trained on."""
        warnings.warn(
            f"a forward pass of the instrumented model in the monitored step {step} ran under"
            f" {foreign}; tmm runs such passes as they are and measures nothing of them. Put them"
            " into a block `with monitor.no_monitor():` to say that this is meant",
            MonitoringWarning,
            stacklevel=levels_to_user(),
        )


def words(error: BaseException) -> str:
    """Type and message of an error, also of one whose message cannot be written."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # the __str__ of a user's exception may fail
        return f"{type(error).__name__}, whose message cannot be written"


def levels_to_user() -> int:
    """How far up the stack the first frame is that is the user's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_own(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_own(module: str) -> bool:
    # contextlib is that of `with monitor.step()`, torch that of calls of a module and of hooks.
    return module.partition(".")[0] in ("tmm", "torch", "contextlib")
