"""A step that is over, to which values may still be added."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tmm.core.records import StepRecord
from tmm.runtime.step_collector import StepCollector


@dataclass(frozen=True, eq=False)
class EndedStep:
    """What is known of a step that has ended, in the order in which it came.

    ``parts`` are empty for a step of which nothing was recorded.
    """

    step: int
    parts: tuple[StepCollector, ...] = ()

    def with_part(self, part: StepCollector) -> EndedStep:
        """The same step with more values, which replace those of the same keys."""
        return replace(self, parts=(*self.parts, part))

    @property
    def is_on_host(self) -> bool:
        """Whether the last part can be read without waiting for an accelerator or other ranks."""
        return self.parts[-1].is_on_host

    def record(self) -> StepRecord:
        """The whole step; waits for copies under way. With the events of the last part alone."""
        first, *later = map(_record, self.parts)
        for record in later:
            first = first.extended(record)
        return first


def _record(part: StepCollector) -> StepRecord:
    try:
        return part.record()
    except Exception:  # which was told when the step itself was evaluated
        return part.logged(is_certain=True).record()
