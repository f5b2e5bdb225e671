"""A run into which each rank records its own rows, beside those of the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from tmm.core.metrics import HISTOGRAM_EDGES
from tmm.runs.at_path import AtExit, PathRun
from tmm.runs.machine import StepClock
from tmm.runs.run_steps import last
from tmm.runtime.ranks.gloo import ProcessGroup
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.store.run_writer import RunWriter
from tmm.spec.ranks import is_joined
from tmm.steps.earlier import Earlier
from tmm.steps.ended_step import EndedStep


def run_of_rank(path: Path, *, resume: bool) -> PathRun | RankRun:
    """The run at a path, for this rank; all ranks call it together.

    Rank 0 claims the folder, keeps what is no segment, and says what becomes of the run.

    Raises:
        ValueError, OSError: on rank 0, as `PathRun` does.
        RuntimeError: on the others, if rank 0 cannot record, or a rank does not come.
    """
    if not is_joined():
        return PathRun(path, resume=resume, rank=0)
    rank = dist.get_rank()
    group = ProcessGroup()
    try:
        if rank == 0:
            try:
                own = PathRun(path, resume=resume, rank=0)
            except BaseException as error:
                group.everything((None, False, f"{type(error).__name__}: {error}"))
                raise
            group.everything((str(own.writer.path), own.earlier is not None, ""))
            return own
        claimed = group.everything(None)[0]
    finally:
        group.close()
    assert isinstance(claimed, tuple)
    place, resumes, error_text = claimed
    if place is None:
        raise RuntimeError(f"per_rank=True: rank 0 cannot record: {error_text}")
    return RankRun(Path(place), rank, resumes=resumes)


class RankRun:
    """The part of a run that this rank records: it ends with its monitor, or with the process."""

    notice = ""

    def __init__(self, path: Path, rank: int, *, resumes: bool) -> None:
        self._close_at_exit = AtExit()
        self.earlier = Earlier.of(path) if resumes else None
        self.writer = RunWriter(
            path,
            info={},
            histogram_edges=HISTOGRAM_EDGES,
            started=self._close_at_exit.register,
            rank=rank,
        )

    def close_at_exit(self, close: Callable[[], None]) -> None:
        """Let the method ``close`` end the recording with the process, unless it did before."""
        self._close_at_exit.call(close)

    def give_up(self) -> None:
        """End the recording, into which nothing will be recorded."""
        self.writer.close()


class RankClock:
    """Adds to each step of a rank how long it took there."""

    def __init__(self) -> None:
        self._clock = StepClock()

    def begins(self) -> None:
        """The user begins a step of the monitor."""

    def completes(self, collector: StepCollector) -> None:
        """Add the seconds since the last step."""
        for key, value in self._clock.mark().items():
            number = torch.tensor(value, dtype=torch.float64, device="cpu")
            collector.log(key, number, last, of_all_ranks=False)

    def passes(self) -> None:
        """A step has ended that is not recorded: the next one is not taken for both."""
        self._clock.mark()

    def keep(self, ended: EndedStep) -> None:
        """Nobody logs between the steps of a monitor."""
        raise AssertionError("a monitor without a run has no values between steps")
