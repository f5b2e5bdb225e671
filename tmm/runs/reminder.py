"""Notices a run whose steps nobody ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

_MANY_VALUES = 100  # of one key in one step, of which the last one counts
_MANY_UPDATES = 2000  # of a model in one step: some algorithms have hundreds
_FEW = 3  # in the only step of a run that has ended

_LOST_VALUES = (
    "{key!r} was logged {count} times in step {step}, and the last value counts: call run.step() at"
    " the end of each step of the training, or run.log(values, step=n)"
)
_JOINED_UPDATES = (
    "{count} optimizer steps ran in step {step}, which are recorded as one: call run.step() at the"
    " end of each step of the training"
)


class StepReminder:
    """Follows what happens in the steps of a run, until somebody ends one.

    ``tell`` takes a step and what a user should know of it; it is called once.
    """

    def __init__(self, tell: Callable[[int, str], None]) -> None:
        self._tell = tell
        self._has_told = False
        self._has_ended = False  # any step
        self._most: tuple[int, str, int] | None = None  # count, key, step
        self._updates = 0
        self._handle: RemovableHandle | None = None

    def note_logged(self, step: int, key: str, count: int) -> None:
        """A value of a key was logged, the one of that number in the step."""
        if self._most is None or count > self._most[0]:
            self._most = count, key, step
        if count == _MANY_VALUES:
            self._say(step, _LOST_VALUES.format(key=key, count=count, step=step))

    def note_step(self) -> None:
        """Somebody ended a step, or has steps of his own."""
        self._has_ended = True
        self.stop()

    def count_updates(self, holds: Callable[[Optimizer], bool], step: Callable[[], int]) -> None:
        """Count the steps of the optimizers that ``holds`` tells of, in the ``step`` that is open.

        That ends with the first step that somebody ends.
        """
        if self._has_ended or self._handle is not None:
            return
        known: WeakSet[Optimizer] = WeakSet()

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def note(optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
            if optimizer not in known and not holds(optimizer):
                return
            known.add(optimizer)
            self._updates += 1
            if self._updates == _MANY_UPDATES:
                self._say(step(), _JOINED_UPDATES.format(count=self._updates, step=step()))

        self._handle = register_optimizer_step_post_hook(note)

    def stop(self) -> None:
        """Count no longer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def note_end(self, step: int) -> None:
        """The run is about to end, in a ``step``, as it should."""
        self.stop()
        if self._has_ended:
            return
        if self._most is not None and self._most[0] >= _FEW:
            count, key, at = self._most
            self._say(at, _LOST_VALUES.format(key=key, count=count, step=at))
        elif self._updates >= _FEW:
            self._say(step, _JOINED_UPDATES.format(count=self._updates, step=step))

    def _say(self, step: int, text: str) -> None:
        if not self._has_told:
            self._has_told = True
            self._tell(step, text)
