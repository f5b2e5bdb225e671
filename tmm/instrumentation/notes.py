"""What could not be told of a monitored program: nothing that only explains may break a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from tmm.core.failures import words

Parameters = ParamSpec("Parameters")
Told = TypeVar("Told")


class Notes:
    """Runs what only explains; where that fails, a note of the reason takes its place.

    ``texts`` are the notes, each once, in the order in which they came up.
    """

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}

    def attempt(self, subject: str, tell: Callable[[], Told], instead: Told) -> Told:
        """What ``tell`` gives, or ``instead`` and a note that names ``subject`` where it fails."""
        try:
            return tell()
        except Exception as error:  # whatever it is, the training does not depend on it
            first_line = words(error).strip().partition("\n")[0]
            self.texts[f"{subject}: {first_line}"] = None
            return instead

    def guarded(self, subject: str, tell: Callable[Parameters, None]) -> Callable[Parameters, None]:
        """``tell``, such that a failure of it becomes a note."""

        def told(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
            self.attempt(subject, lambda: tell(*args, **kwargs), None)

        return told
