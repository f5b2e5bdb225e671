"""Values as lines of JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tmm.runs.delivery import RunInfo, Value
from tmm.runs.text_values import plain
from tmm.sinks.common import check_keys
from tmm.sinks.lines import StepFile


@dataclass(frozen=True)
class JSONLinesSink:
    """Writes an object for each step, ``{"step": n, "values": {key: value, ...}}``.

    Histograms are lists of counts. JSON has no other numbers than finite ones: they are the strings
    ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``, which Python's ``float`` reads.

    Attributes:
        path: the file; ``values.jsonl`` in the folder of the run without it. A run that is resumed
            goes on with it; another one writes it anew.
        keys: regular expression (``re.match``) of the keys to write; all of them without it.
    """

    path: str | os.PathLike[str] | None = None
    keys: str | None = None

    def __post_init__(self) -> None:
        check_keys(self.keys)

    def open(self, run: RunInfo) -> StepFile:
        """Start to write; raises OSError."""
        return StepFile(Path(self.path or run.path / "values.jsonl"), run, self.keys, _line)


def _line(step: int, values: Mapping[str, Value]) -> bytes:
    texts = {k: v.tolist() if isinstance(v, np.ndarray) else plain(v) for k, v in values.items()}
    return json.dumps({"step": step, "values": texts}, allow_nan=False).encode() + b"\n"
