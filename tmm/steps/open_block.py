"""The steps that begin while the block of another one is open."""

from __future__ import annotations

from tmm.runtime.step_collector import StepCollector
from tmm.steps.forgotten import Forgotten
from tmm.steps.forward_recorder import ForwardRecorder
from tmm.steps.step_block import StepBlock


class OpenBlock:
    """The block whose step is open, and the steps that begin inside of it, which are none."""

    def __init__(self, recorder: ForwardRecorder, forgotten: Forgotten) -> None:
        self._recorder = recorder
        self._forgotten = forgotten
        self._outer: StepBlock | None = None
        self._nested: list[bool] = []  # of each step inside, whether what came before was recorded

    def holds(self, collector: StepCollector | None) -> bool:
        """Whether the step that ``collector`` gathers is that of a block."""
        return self._outer is not None and collector is self._outer.collector

    def enter(self, block: StepBlock, collector: StepCollector | None) -> None:
        """The step of a block has begun."""
        block.collector, self._outer = collector, block

    def begin_nested(self, step: int) -> bool:
        """A step begins inside; tells whether what runs in it belongs to the open one."""
        assert self._outer is not None
        self._forgotten.note_nested(step, self._outer.step)
        self._nested.append(self._recorder.recording)
        self._recorder.recording = self._recorder.recording and step == self._outer.step
        return self._recorder.recording

    def end_nested(self) -> bool:
        """End the innermost step inside; tells whether there was one."""
        if not self._nested:
            return False
        self._recorder.recording = self._nested.pop()
        return True

    def leave(self, block: StepBlock) -> None:
        """A block is left."""
        if self._nested:
            self._recorder.recording = self._nested.pop() if block.is_nested else self._nested[0]
        if not block.is_nested:
            self._outer = None
            self._nested.clear()

    def forget_nested(self) -> None:
        """The open step is over, and those inside of it."""
        self._nested.clear()
