"""Values in TensorBoard."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tmm.core.metrics import FloatArray
from tmm.runs.delivery import RunInfo, Value
from tmm.runs.state import Status
from tmm.sinks.common import FINITE_EDGES, check_keys, chosen, require


@dataclass(frozen=True)
class TensorBoardSink:
    """Writes events that TensorBoard shows: numbers in float64, and histograms.

    Keys are tags as they are; NaN and infinities are kept. The sums and the least and largest value
    that go with a histogram are not known: sums are NaN, the others edges of bins.

    Attributes:
        folder: where to write; ``tensorboard`` in the folder of the run without it, so that
            ``tensorboard --logdir runs`` shows all runs. A run that is resumed goes on there, and
            what it repeats takes the place of what was there.
        keys: regular expression (``re.match``) of the keys to write; all of them without it.
    """

    folder: str | os.PathLike[str] | None = None
    keys: str | None = None

    def __post_init__(self) -> None:
        check_keys(self.keys)

    def open(self, run: RunInfo) -> OpenTensorBoard:
        """Start to write; raises ImportError and OSError."""
        return OpenTensorBoard(
            Path(self.folder or run.path / "tensorboard").absolute(), self.keys, run
        )


class OpenTensorBoard:
    """The events of one run."""

    def __init__(self, folder: Path, keys: str | None, run: RunInfo) -> None:
        require("tensorboard", "tensorboard")
        writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter
        events = require("tensorboard.compat.proto.event_pb2", "tensorboard")
        self._event, self._session_log = events.Event, events.SessionLog
        self._keys = keys
        _wait_for_a_later_name(folder)
        # Also at the first start: TensorBoard goes back at the second sign of a start only.
        self._writer: Any = writer(folder, purge_step=run.first_step)
        self._step: int | None = None
        if not run.resumed:
            about = {"config": dict(run.config), "tags": run.tags, "notes": run.notes}
            self._writer.add_text("run", f"```json\n{json.dumps(about, indent=2)}\n```")

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        """Write what a step recorded."""
        if self._step is not None and step <= self._step:
            start = self._session_log(status=self._session_log.START)
            self._writer.file_writer.add_event(self._event(session_log=start), step)
        self._step = step
        for key, value in chosen(values, self._keys).items():
            if isinstance(value, np.ndarray):
                self._add_histogram(key, value, step)
            else:
                self._writer.add_scalar(key, value, step, new_style=True, double_precision=True)
        self._writer.flush()

    def close(self, status: Status) -> None:
        """Write what is left."""
        self._writer.close()

    def _add_histogram(self, key: str, counts: FloatArray, step: int) -> None:
        filled = np.flatnonzero(counts)
        first, last = (int(filled[0]), int(filled[-1])) if len(filled) else (0, 0)
        self._writer.add_histogram_raw(
            key,
            min=FINITE_EDGES[first],
            max=FINITE_EDGES[last + 1],
            num=counts.sum(),
            sum=np.nan,
            sum_squares=np.nan,
            bucket_limits=FINITE_EDGES[1:],
            bucket_counts=counts,
            global_step=step,
        )


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait, where a file of events was begun in this second, until the second is over.

    TensorBoard reads files in the order of their names. These hold the whole second, and within it
    a process's number and a count as text, where 10 comes before 9.
    """
    seconds = (path.name.split(".")[3] for path in folder.glob("events.out.tfevents.*"))
    if str(int(now := time.time())) in seconds:
        time.sleep(int(now) + 1 - now)
