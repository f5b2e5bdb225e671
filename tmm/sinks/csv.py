"""Values as comma-separated text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tmm.runs.delivery import RunInfo, Value
from tmm.runs.text_values import csv_cell
from tmm.sinks.common import check_keys, numbers
from tmm.sinks.lines import StepFile

_HEADER = b"step,key,value\n"


@dataclass(frozen=True)
class CSVSink:
    """Writes ``step,key,value``, one row for each number, as ``tmm runs export`` does.

    A row needs no column of its own key, so that keys may come later. Numbers read back exactly;
    others are ``nan``, ``inf`` and ``-inf``. Histograms are left out. A key that a spreadsheet
    would take for a formula, or that begins with an apostrophe, has an apostrophe before it.

    Attributes:
        path: the file; ``values.csv`` in the folder of the run without it. A run that is resumed
            goes on with it; another one writes it anew.
        keys: regular expression (``re.match``) of the keys to write; all of them without it.
    """

    path: str | os.PathLike[str] | None = None
    keys: str | None = None

    def __post_init__(self) -> None:
        check_keys(self.keys)

    def open(self, run: RunInfo) -> StepFile:
        """Start to write; raises OSError."""
        path = Path(self.path or run.path / "values.csv")
        return StepFile(path, run, self.keys, _rows, _HEADER)


def _rows(step: int, values: Mapping[str, Value]) -> bytes:
    rows = numbers(values, None).items()
    text = "".join(f"{step},{csv_cell(key)},{float(value)!r}\n" for key, value in rows)
    return text.encode("utf-8", "surrogatepass")
