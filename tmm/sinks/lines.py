"""A text file of steps that a later start goes on with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from tmm.runs.delivery import RunInfo, Value
from tmm.runs.state import Status
from tmm.sinks.common import chosen

_STEP = re.compile(rb'(?:\{"step": )?(-?\d+),')


class StepFile:
    """The file of one run, of the lines that ``render`` makes of a step and its values.

    Steps are appended in their order, and each is flushed. A line begins with its step and a comma,
    after ``{"step": `` in JSON; one that does not goes on with the line before. Of a run that was
    resumed a file that exists is gone on with: its first step and later ones are cut off, and so is
    a line that a killed process has not ended. A step that is written again takes the place of what
    was written for it.

    Raises ``ValueError`` for a file that begins with something else than ``header``, and OSError.
    """

    def __init__(
        self,
        path: Path,
        run: RunInfo,
        keys: str | None,
        render: Callable[[int, Mapping[str, Value]], bytes],
        header: bytes = b"",
    ) -> None:
        self._keys, self._render = keys, render
        if not run.resumed:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        begin = self._file.read(len(header))
        if not header.startswith(begin):
            self._file.close()
            raise ValueError(f"{path} does not begin with {header!r}; give another path")
        end = len(header)
        for line in self._file:
            step = _STEP.match(line)
            if not line.endswith(b"\n") or (step is not None and int(step[1]) >= run.first_step):
                break
            end += len(line)
        if begin == header:
            self._file.truncate(end)
        else:
            self._file.truncate(0)
            self._file.write(header)
        self._step: int | None = None
        self._start = 0

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        """Write a step."""
        lines = self._render(step, chosen(values, self._keys))
        if self._step is not None and step <= self._step:
            self._file.truncate(self._start)
        self._start = self._file.seek(0, 2)
        self._file.write(lines)
        self._file.flush()
        self._step = step

    def close(self, status: Status) -> None:
        """Close the file."""
        self._file.close()
