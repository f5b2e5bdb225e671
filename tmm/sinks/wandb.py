"""Values in Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tmm.runs.delivery import RunInfo, Value
from tmm.runs.state import Status
from tmm.sinks.common import FINITE_EDGES, check_keys, chosen, require


@dataclass(frozen=True)
class WandbSink:
    """Logs to a W&B run of the same id, name, configuration, tags and notes.

    The run is not ``wandb.run``: what a program logs there is its own. Numbers are kept in float64,
    with NaN and infinities; histograms become ``wandb.Histogram``. W&B cannot take a step back:
    where a resumed run repeats steps, W&B keeps those that it has.

    Attributes:
        project: of W&B; that of the run without it.
        keys: regular expression (``re.match``) of the keys to log; all of them without it.
        run: log to this run of W&B instead, which is not finished then. Steps are tmm's.
        options: further arguments of ``wandb.init``, such as ``entity`` or ``mode``.
    """

    project: str | None = None
    keys: str | None = None
    run: Any = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_keys(self.keys)

    def open(self, run: RunInfo) -> OpenWandb:
        """Start or resume the run of W&B; raises ImportError and what ``wandb.init`` raises."""
        wandb = require("wandb", "wandb")
        if self.run is not None:
            return OpenWandb(wandb, self.run, self.keys, 0, finishes=False)
        settings = {
            "project": self.project or run.project,
            "id": run.id,
            "name": run.name,
            "config": dict(run.config),
            "tags": run.tags,
            "notes": run.notes,
            "resume": "allow",
            "reinit": "create_new",
        }
        opened = wandb.init(**settings | dict(self.options))
        # Offline it does not know what it has.
        known = 0 if run.last_step is None else run.last_step + 1
        return OpenWandb(wandb, opened, self.keys, known if opened.offline else opened.step)


class OpenWandb:
    """One run of W&B; steps before ``first_step`` are there already."""

    def __init__(
        self, wandb: Any, run: Any, keys: str | None, first_step: int, *, finishes: bool = True
    ) -> None:
        self._wandb, self._run, self._keys = wandb, run, keys
        self._first_step, self._finishes = first_step, finishes

    def __call__(self, step: int, values: Mapping[str, Value]) -> None:
        """Log what a step recorded."""
        if step >= self._first_step:
            found = chosen(values, self._keys).items()
            self._run.log({key: self._shown(value) for key, value in found}, step=step)

    def close(self, status: Status) -> None:
        """Finish the run of W&B, as failed if it did."""
        if self._finishes:
            self._run.finish(exit_code=int(status == "failed"))

    def _shown(self, value: Value) -> Any:
        if isinstance(value, np.ndarray):
            return self._wandb.Histogram(np_histogram=(value, FINITE_EDGES))
        return value
