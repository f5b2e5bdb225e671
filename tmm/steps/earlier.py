"""What a run that goes on had recorded before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tmm.runtime.store.run_reader import RunReader


@dataclass(frozen=True)
class Earlier:
    """The steps that a run had recorded when it was resumed; None for none.

    ``asked`` is the step from which it is to go on, where somebody said so.
    """

    first: int | None = None
    last: int | None = None
    asked: int | None = None

    @staticmethod
    def of(path: Path, asked: int | None = None) -> Earlier:
        """That of the run in a folder; raises OSError, and ValueError for damaged files."""
        with RunReader(path) as run:
            steps = run.steps
        if not len(steps):
            return Earlier(asked=asked)
        return Earlier(int(steps[0]), int(steps[-1]), asked)

    def goes_back(self, step: int) -> str | None:
        """What is to be told of a run that goes on from ``step``; None for one after its end."""
        if self.last is None or step > self.last:
            return None
        return (
            f"the run goes on from step {step}: what it had recorded from there on, up to step"
            f" {self.last}, no longer counts"
        )

    def is_expected(self, step: int) -> bool:
        """Whether a run that goes back to ``step`` does so as from a checkpoint."""
        if self.asked is not None:
            return step >= self.asked
        return self.first is not None and step > self.first


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """How what is measured in a run differs from what was before."""
    return "; ".join(
        f"the {name} was {known}, and is {now[name]}" for name, known in before.items()
    )
