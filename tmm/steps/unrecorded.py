"""Blocks whose forward passes are none of the step that is open."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from tmm.steps.step_threads import StepThreads
from tmm.steps.timeline import StepTimeline


class Recording(Protocol):
    """What records forward passes, as long as ``recording`` says so."""

    recording: bool
    timeline: StepTimeline
    threads: StepThreads


@contextmanager
def unrecorded(passes: Recording) -> Iterator[None]:
    """Record no forward passes in the block."""
    collector = passes.timeline.open
    if passes.threads.are_others():
        yield  # what this thread runs is none of the step anyway
        return
    recording, passes.recording = passes.recording, False
    if collector is not None:
        collector.expects_forward = False  # it may be one that is not to be measured
    try:
        yield
    finally:
        # A step that has begun meanwhile, here or in another thread, is recorded or not.
        if passes.timeline.open is collector:
            passes.recording = recording
