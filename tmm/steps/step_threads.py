"""Which thread a step belongs to, where others call the model as well."""

from __future__ import annotations

import threading

import torch

from tmm.core.failures import Gaps
from tmm.steps.timeline import StepTimeline

_OTHER_THREADS = "forward passes in other threads"
_NOT_OF_THE_STEP = (
    "a forward pass with gradients ran in another thread than that of the open step, and is not"
    " measured; open the step in the thread that trains. Put passes that are no training under"
    " torch.no_grad()"
)


class StepThreads:
    """The thread that opened a step has it.

    A step that a run opens by itself, as it begins, is that of the first pass with gradients.
    """

    def __init__(self, timeline: StepTimeline, gaps: Gaps, unmeasured: dict[str, str]) -> None:
        self._timeline = timeline
        self._gaps = gaps
        self._unmeasured = unmeasured
        self._opener = self._owner = 0

    def begin(self) -> None:
        """This thread has opened a step."""
        self._opener = threading.get_ident()
        self._owner = 0 if self._timeline.is_of_run else self._opener

    def are_others(self) -> bool:
        """Whether this thread is another than that of the step, the last one if none is open."""
        return bool(self._opener) and threading.get_ident() != (self._owner or self._opener)

    def pass_by(self, *, trains: bool) -> bool:
        """Whether a forward pass that begins now is none of the step, as this thread is another.

        ``trains`` tells that its rows would be missed, which is said then.
        """
        if not self._owner and self._opener and torch.is_grad_enabled():
            self._owner = threading.get_ident()
        if not self.are_others():
            return False
        collector = self._timeline.open
        if trains and collector is not None and torch.is_grad_enabled():
            self._unmeasured[_OTHER_THREADS] = _NOT_OF_THE_STEP
            self._gaps.warn_once(_OTHER_THREADS, collector.step, _NOT_OF_THE_STEP)
        return True
