"""The rows of one step of all ranks together: a thread, and few collectives per monitored step."""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from tmm.core.failures import UserLine
from tmm.core.metrics import FloatArray, Reduction
from tmm.runtime.partials import Rows
from tmm.runtime.ranks.joined_rows import JoinedLayout, joined, maxima, moments, sums

_NO_STEP = -np.inf


class Collectives(Protocol):
    """What ranks do together; every call is one collective, and all ranks make the same calls."""

    rank: int

    def maximum(self, values: FloatArray) -> FloatArray:
        """The largest of each element over all ranks."""

    def total(self, values: FloatArray) -> FloatArray:
        """The sum of each element over all ranks."""

    def everything(self, value: object) -> list[object]:
        """The values of all ranks, in order."""

    def payloads(self, value: bytes, size: int) -> list[bytes]:
        """On rank 0 the bytes of all ranks, in order, each padded to ``size``; else nothing."""

    def close(self) -> None:
        """Nothing will be called any more."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """What one rank has measured in a step, or all ranks together.

    ``payloads`` are what rank 0 gets as it is: of one rank one at most, of all one of each.
    """

    rows: Mapping[Reduction, Rows] = field(default_factory=dict)
    payloads: tuple[bytes, ...] = ()


class Measured(Protocol):
    """A step that one rank has measured."""

    step: int

    def contribution(self) -> Exchange | None:
        """What the rank has; None if its measurement failed. Called in another thread, once."""


Step = TypeVar("Step", bound=Measured)


class NotJoinedError(RuntimeError):
    """A step of this rank will not be joined with those of the others."""


class RanksDisagreeError(NotJoinedError):
    """The ranks measure different things, or one failed to: there is nothing to record."""


class RanksLostError(NotJoinedError):
    """The other ranks are late or gone: what this rank has measured is all there will be."""


class Turn(Generic[Step]):
    """A step that waits to be joined, and what became of it."""

    def __init__(self, measured: Step, on_late: Callable[[str], None] = lambda text: None) -> None:
        self.measured = measured
        self._on_late = on_late
        self._began = time.monotonic()
        self._changed = threading.Condition()
        self._outcome: Exchange | NotJoinedError | None = None
        self._contributing = threading.Lock()
        self._contribution: tuple[Exchange | None] | None = None

    def contribution(self) -> Exchange | None:
        """What this rank has; kept, for the ranks may have an earlier step to join first."""
        with self._contributing:
            if self._contribution is None:
                self._contribution = (self.measured.contribution(),)
            return self._contribution[0]

    @property
    def is_over(self) -> bool:
        """Whether it is known what became of it."""
        with self._changed:
            return self._outcome is not None

    def end(self, outcome: Exchange | NotJoinedError) -> None:
        """It is joined, or will never be; what it was told first counts."""
        with self._changed:
            if self._outcome is None:
                self._outcome = outcome
            self._changed.notify_all()

    def wait(self, seconds: float | None = None) -> Exchange:
        """The joined step, at the latest ``seconds`` after this rank was done, if given.

        Raises:
            NotJoinedError: if there will be none, with the reason.
        """
        passed = time.monotonic() - self._began
        remaining = None if seconds is None else max(0.0, seconds - passed)
        with self._changed:
            self._changed.wait_for(lambda: self._outcome is not None, remaining)
            if self._outcome is None:
                late = f"the other ranks are more than {seconds:.0f} s late"
                self._outcome = RanksLostError(late)
                self._on_late(late)
            if isinstance(self._outcome, NotJoinedError):
                raise self._outcome
            return self._outcome


class CrossRank:
    """Joins the monitored steps of all ranks, in a thread of its own.

    A monitored step takes one maximum and one sum over ranks, a second sum if there are central
    moments, and a gather if functions need all values. The first steps, and those that have rows
    for the first time, take one gather and one maximum more. Ranks may leave out steps, or end
    earlier than others: until all have called `close`, their threads take part without rows.

    A rank that fails in a step takes the step from all. If the ranks cannot talk any more, or
    measure different things, the training goes on: it is warned of, and no step is joined again.
    At most ``capacity`` steps wait for other ranks; of one more the earliest is given up.
    """

    def __init__(
        self,
        collectives: Collectives,
        *,
        capacity: int = 32,
        end_seconds: float = 600.0,
        linger_seconds: float = 10.0,
    ) -> None:
        self._collectives = collectives
        self._capacity = capacity
        self.behind = ""
        """How far the other ranks were behind when a step was first recorded without them."""
        self._end_seconds = end_seconds
        self._linger_seconds = linger_seconds
        self._layout = JoinedLayout()
        self._turns: deque[Turn[Any]] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._broken: NotJoinedError | None = None
        self._begun_at = UserLine.here()  # a thread has no line of the user
        self._thread = threading.Thread(target=self._run, name="tmm ranks", daemon=True)
        self._thread.start()

    def submit(self, measured: Step) -> Turn[Step]:
        """Join a step with those of the other ranks; steps increase. Waits for nothing."""
        turn = Turn(measured, self._note)
        with self._changed:
            if self._broken is not None:
                turn.end(self._broken)
                return turn
            if len(self._turns) >= self._capacity:
                behind = f"the other ranks are {len(self._turns)} monitored steps behind"
                self._turns.popleft().end(RanksLostError(behind))
                self._note(behind)
            self._turns.append(turn)
            self._changed.notify_all()
        return turn

    def _note(self, text: str) -> None:
        self.behind = self.behind or text

    def close(self, *, has_failed: bool = False) -> None:
        """Join what waits; gives up after ``end_seconds``.

        Waits ``linger_seconds`` of these for the other ranks to close. After that the thread goes
        on taking part, as long as the process lives, which waits for it once more when it exits.
        A training that ``has_failed`` here waits no longer for the rows of others: these may be
        waiting for it, as in a pipeline, until its process has ended.
        """
        seconds = min(self._linger_seconds, self._end_seconds) if has_failed else self._end_seconds
        deadline = time.monotonic() + seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._turns, seconds)
        if not done:
            self._fail(RanksLostError(f"the other ranks were {seconds:.0f} s late"))
        self._thread.join(max(0.0, min(self._linger_seconds, deadline - time.monotonic())))
        if self._thread.is_alive() and self._broken is None and not has_failed:
            atexit.register(self._thread.join, self._end_seconds)

    def _run(self) -> None:
        try:
            while self._broken is None and self._round():
                pass
        except RanksDisagreeError as error:
            self._fail(error)
        except Exception as error:  # of the network
            self._fail(RanksLostError(f"{type(error).__name__}: {error}"))
        finally:
            self._collectives.close()

    def _fail(self, reason: NotJoinedError) -> None:
        text = f"the rows of all ranks cannot be joined any more: {reason}"
        with self._changed:
            if self._broken is not None:
                return
            self._broken = type(reason)(text)
            waiting, self._turns = list(self._turns), deque()
            self._changed.notify_all()
        for turn in waiting:
            turn.end(self._broken)
        if self._closing and not waiting:
            return  # nothing is lost
        is_lost = isinstance(reason, RanksLostError)
        left = "hold the rows of this rank alone, marked as partial" if is_lost else "are gaps"
        text = f"{text}. The training goes on; its monitored steps {left}."
        self._begun_at.warn(text, RuntimeWarning)

    def _next(self) -> Turn[Any] | None:
        """The next step; None once there is none to come."""
        with self._changed:
            self._changed.wait_for(lambda: self._turns or self._closing)
            return self._turns[0] if self._turns else None

    def _round(self) -> bool:
        """Join one step; False if all ranks have ended."""
        turn = self._next()
        contribution = None if turn is None else turn.contribution()
        failed = turn is not None and contribution is None
        mine = contribution or Exchange()
        step = _NO_STEP if turn is None else float(turn.measured.step)
        while True:
            payload = b"".join(mine.payloads)
            missing = self._layout.missing(mine.rows)
            header = [-step if step != _NO_STEP else _NO_STEP, step, bool(missing), failed]
            own = self._layout.own({} if missing else mine.rows)
            sent = np.concatenate([[*header, len(payload)], maxima(own)]).astype(np.float64)
            found = self._collectives.maximum(sent)
            first, last, lacking, any_failed, size = found[:5]
            if last == _NO_STEP:
                return False
            if -first != last:  # a rank is further on, and has nothing of the earliest step
                if step != -first:
                    mine, step, failed, turn = Exchange(), _NO_STEP, False, None
                continue
            if lacking:
                self._agree(missing)
                continue
            break
        outcome: Exchange | NotJoinedError = RanksDisagreeError("a rank failed to measure it")
        if not any_failed:
            largest = found[5:]
            total = self._collectives.total(sums(own, largest))
            central = moments(own, largest, total)
            if central.size:
                central = self._collectives.total(central)
            payloads = self._collectives.payloads(payload, int(size)) if size else []
            rows = joined(self._layout, own, largest, total, central)
            outcome = Exchange(rows, tuple(payloads))
        if turn is not None:
            with self._changed:
                turn.end(outcome)
                if self._turns and self._turns[0] is turn:
                    self._turns.popleft()
                self._changed.notify_all()
        return True

    def _agree(self, missing: Sequence[tuple[Reduction, str]]) -> None:
        difference = self._layout.extend(self._collectives.everything(missing))  # type: ignore[arg-type]
        if difference is not None:
            raise RanksDisagreeError(f"{difference}; give every rank the same spec and model")
