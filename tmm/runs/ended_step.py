"""A step that is over, to which values may still be added."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tmm.layout import StepRecord
from tmm.runtime.collector import StepCollector


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
        """The whole step; waits for copies under way. With the events of the last part alone.

        Raises ``ValueError`` for an aggregate of the last part that fails.
        """
        known: StepRecord | None = None
        for part in self.parts:
            try:
                record = part.record()
            except ValueError:
                if part is self.parts[-1]:
                    raise
                continue  # its step is a gap already
            known = record if known is None else known.extended(record)
        assert known is not None
        return known
