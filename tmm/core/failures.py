"""What keeps a step from being recorded, and how often that has happened."""

from __future__ import annotations

import sys
import warnings
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tmm.core.records import Event

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

_OWN = frozenset(("tmm", "torch", "contextlib"))
"""Packages whose frames are no user's. contextlib is that of ``with monitor.no_monitor()``, torch
that of calls of a module and of hooks."""

_FRAMEWORKS = frozenset(
    (
        *("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"),
        *("transformers", "accelerate", "torchtnt"),
    )
)
"""Packages that call tmm, and that a user calls."""

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
        self._told: set[str] = set()
        self._events: list[Event] = []
        self._begun_at = UserLine.here()
        self._late: deque[tuple[int, Exception, bool]] = deque()

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

    def add(self, step: int, reason: str, kind: str = "gap") -> None:
        """A step is not recorded, or an event of another ``kind`` is to be kept with it."""
        self._events.append(Event(step, kind, reason))

    def add_failure(self, step: int, error: Exception) -> None:
        """A step is not recorded because monitoring failed; warns of the first one in a row."""
        self._failures += 1
        self.add(step, f"monitoring failed: {words(error)}")
        if self._failures == 1:
            self._warn_of_failure(step, error)

    def add_late_failure(self, step: int, error: Exception, *, is_raised: bool) -> Event:
        """A step that was handed over could not be evaluated; called by the writer's thread.

        The training thread raises it, or warns, at its next step; gives the event for the run.
        """
        self._late.append((step, error, is_raised))
        return Event(step, "gap", f"monitoring failed: {words(error)}")

    def tell_late_failures(self) -> None:
        """Raise, or warn of, what the writer's thread could not evaluate."""
        while self._late:
            step, error, is_raised = self._late.popleft()
            if is_raised:
                raise error
            self._failures += 1
            if self._failures == 1:
                self._warn_of_failure(step, error)

    def _warn_of_failure(self, step: int, error: Exception) -> None:
        if is_of_collective(error):  # which the training needs as well
            warn(
                f"monitoring failed on step {step}, which is not recorded: processes did not reach"
                f" one another. {words(error)}"
            )
        else:
            warn(
                f"monitoring failed on step {step}, which is not recorded; the training goes on."
                f" {words(error)}"
            )

    def warn_of_missed_forward(self, step: int, hint: str) -> None:
        """Warn, once, that no forward pass ran in a monitored step, and what to do."""
        self.warn_once(
            "missed forward",
            step,
            f"no forward pass of the instrumented model ran in the monitored step {step}, so"
            f" that nothing of one was measured. {hint}",
        )

    def warn_once(self, kind: str, step: int, text: str, *, event: str = "note") -> bool:
        """Warn, once of a kind, of what leaves rows out or makes them less than they seem.

        The run keeps it as an ``event`` of that kind. Tells whether it was the first time.
        """
        if kind in self._told:
            return False
        self._told.add(kind)
        self.tell(step, text, event)
        return True

    def warn_of_foreign_pass(self, step: int, foreign: str) -> None:
        """Warn that a forward pass was traced or transformed instead of trained on."""
        self.tell(
            step,
            f"a forward pass of the instrumented model in the monitored step {step} ran under"
            f" {foreign}; tmm runs such passes as they are and measures nothing of them. Put them"
            " into a block `with monitor.no_monitor():` to say that this is meant",
        )

    def tell(self, step: int, text: str, event: str = "note") -> None:
        """Warn, and keep the text in the run as an ``event`` of that kind."""
        self._events.append(Event(step, event, text))
        warn(text, self._begun_at)


@dataclass(frozen=True)
class UserLine:
    """A line of the user's program, for what is told later, or by another thread."""

    file: str
    number: int
    module: str

    @staticmethod
    def here() -> UserLine:
        """The line that is running now."""
        frame = sys._getframe(levels_to_user() - 1)
        module = frame.f_globals.get("__name__", "<unknown>")
        return UserLine(frame.f_code.co_filename, frame.f_lineno, module)

    def warn(self, text: str, category: type[Warning] = MonitoringWarning) -> None:
        """Warn of something that began with this line.

        Of a filter that makes it an error nothing is raised, as nobody waits for it.
        """
        with suppress(category):
            warnings.warn_explicit(text, category, self.file, self.number, self.module)


def warn(text: str, begun_at: UserLine | None = None) -> None:
    """Warn of something at the line of the user that led to it.

    Where none did, as at the end of the process, at the line where it had ``begun_at``.
    """
    level = levels_to_user()
    if begun_at is not None and _is_own(sys._getframe(level - 1).f_globals.get("__name__", "")):
        begun_at.warn(text)
    else:
        warnings.warn(text, MonitoringWarning, stacklevel=level)


def words(error: BaseException) -> str:
    """Type and message of an error, also of one whose message cannot be written."""
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # the __str__ of a user's exception may fail
        return f"{type(error).__name__}, whose message cannot be written"


def is_of_collective(error: BaseException) -> bool:
    """Whether a collective has failed, as where a process is gone: the next one will fail, too."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or "gloo" in words(error)


def levels_to_user() -> int:
    """How far up the stack the first frame is that is the user's; 1 is the frame that asks."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_own(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_own(module: str) -> bool:
    package = module.partition(".")[0]
    return package in _OWN or package in _FRAMEWORKS
