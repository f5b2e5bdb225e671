"""Stands for the writer of a run in a process that records nothing, as another one does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tmm.runtime.store.run_writer import Submission


class SilentWriter:
    """Has the methods of a `RunWriter`, and writes nothing."""

    failure: Exception | None = None

    def __init__(self, path: Path) -> None:
        self.path = path

    def submit(self, record: Submission, *, wait_seconds: float = 0.0) -> bool:
        """Give up a step."""
        return False

    def replace_from(self, step: int) -> None:
        """Nothing was recorded."""

    def describe(self, info: Mapping[str, object]) -> dict[str, object]:
        """Give it up; nothing was said before."""
        return {}

    @property
    def submitted(self) -> int:
        """No record was kept."""
        return 0

    def flush(self) -> None:
        """Nothing waits."""

    def raise_pending(self) -> None:
        """Nothing fails."""

    def write_text(self, name: str, text: str) -> None:
        """Give up a text."""

    def close(self) -> None:
        """Nothing is open."""
