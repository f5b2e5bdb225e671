"""The steps that begin while the block of another one is open."""

from __future__ import annotations

from tmm.runtime.step_collector import StepCollector
from tmm.steps.forgotten import Forgotten
from tmm.steps.forward_recorder import ForwardRecorder
from tmm.steps.step_block import StepBlock


class OpenBlock:
    """The block whose step is open, and the steps that begin inside of it, which are none.

    ``nested`` has of each step inside whether what came before it was recorded.
    """

    def __init__(self, recorder: ForwardRecorder, forgotten: Forgotten) -> None:
        self._recorder = recorder
        self._forgotten = forgotten
        self._outer: StepBlock | None = None
        self.nested: list[bool] = []

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
        self.nested.append(self._recorder.recording)
        self._recorder.recording = self._recorder.recording and step == self._outer.step
        return self._recorder.recording

    def end_nested(self) -> None:
        """End the innermost step inside."""
        self._recorder.recording = self.nested.pop()

    def leave(self, block: StepBlock) -> None:
        """A block is left."""
        if self.nested:
            self._recorder.recording = self.nested.pop() if block.is_nested else self.nested[0]
        if not block.is_nested:
            self._outer = None
            self.nested.clear()
