"""A run as its user reads it: its series, and what else lies in its folder."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from tmm.analysis.story import Story, find_stories
from tmm.runs.artifacts import Sample, read_samples, sample_steps
from tmm.runs.remote import MOST_TEXT, address_of, fetched, without_scheme
from tmm.runs.state import State
from tmm.runtime.store.run_reader import RunReader
from tmm.runtime.store.untrusted import read_file

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from tmm.core.series_by_key import Recorded

    def _is_recorded(run: Run) -> Recorded:
        return run


def open_run(path: str | os.PathLike[str], rank: int | None = None) -> Run:
    """Open the folder of a run for reading, also while another process records into it.

    Where ranks have recorded their own rows (``per_rank=True``) the keys name the rank, as in
    ``activation/0[rank 1]/rms``; with ``rank`` those of one rank are read, under the usual keys.

    Of an address such as ``s3://bucket/runs/gpt`` (of any store that fsspec knows) a copy is read,
    as the run is now; it goes with the object.

    Raises FileNotFoundError where there is no such folder, ValueError where it is no run or one of
    its files is damaged, and OSError where one cannot be read.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path={path!r} is not the path of a folder; of a run give run.path")
    if (address := address_of(path)) is None:
        return _of_rank(Run(without_scheme(path), rank), rank)
    copy = fetched(address)
    run = _of_rank(Run(copy.name, rank), rank)
    weakref.finalize(run, copy.cleanup)
    return run


def _of_rank(run: Run, rank: int | None) -> Run:
    if rank is not None and rank not in (ranks := run.ranks):
        run.close()
        have = f"those of ranks {', '.join(map(str, ranks))}" if ranks else "none of single ranks"
        raise ValueError(f"rank={rank!r}: {run.path} has {have}")
    return run


class Run(RunReader):
    """What a run has recorded, and what else lies in its folder; ``tmm.open_run`` gives one."""

    def samples(self, step: int) -> dict[str, Sample]:
        """Return the texts and arrays that ``LiveRun.log_samples`` kept of a step, by name.

        Raises KeyError, naming the steps that have some.
        """
        if not isinstance(step, (int, np.integer)):
            raise TypeError(f"step={step!r} is not a number")
        return read_samples(self.path, int(step))

    @property
    def sample_steps(self) -> list[int]:
        """The steps that have samples."""
        return sample_steps(self.path)

    @property
    def state(self) -> State | None:
        """What became of the run; None for one without."""
        return State.read(self.path)

    def text(self, name: str) -> str:
        """Return a text saved with the run.

        Raises FileNotFoundError, which names those that there are, and ValueError for what is no
        text.
        """
        path = self.path / name
        if not name or name == ".." or Path(name).name != name or not path.exists():
            texts = sorted(
                found
                for found in os.listdir(self.path)
                if not found.startswith(".") and not found.endswith(".h5")
            )
            raise FileNotFoundError(f"{self.path} holds no text {name!r}; it holds: {texts}")
        return read_file(path, MOST_TEXT).decode("utf-8", "surrogatepass")

    def findings(self) -> tuple[Story, ...]:
        """Return what went wrong: one story per cause, the gravest first, then the earliest.

        Each has its ``cause``, its ``consequences``, the ``evidence`` and ``advice``.
        """
        return find_stories(self)

    def plot(
        self,
        pattern: str | None = None,
        kind: Literal["lines", "heatmap", "depth"] = "lines",
        *,
        log: bool | None = None,
    ) -> Figure:
        """Draw the keys that ``pattern`` matches (`re.match`) as a plotly figure.

        ``"lines"`` are series over steps (without a pattern the losses), ``"heatmap"`` shows layers
        over steps, one panel per metric, and ``"depth"`` values over the layers at the first, the
        middle and the last recorded step; layers are in the order of execution. Long runs are drawn
        by fewer points, which the figure says; extremes and what is not finite are kept. ``log``
        says whether lines and depths have a logarithmic axis; None looks at the values.

        Raises:
            ValueError: for an unknown kind, a pattern that is no regular expression or matches no
                number, metrics that belong to no layer, or too many of them.
            ImportError: without plotly.
        """
        from tmm.views.plots import figure

        return figure(self, pattern, kind, log=log)

    def _repr_html_(self) -> str:
        from tmm.views.report.card import run_card

        return run_card(self)
