"""What a report shows beside each other: runs, and the ranks of a run that recorded themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tmm.analysis.ranks_apart import ranks_apart
from tmm.runs.recorded_run import open_run
from tmm.runs.remote import address_of, fetched
from tmm.runs.run_record import RunRecord
from tmm.views.report.facts import run_facts
from tmm.views.report.snapshot import Snapshot

_MOST_RANKS = 8
"""Of a run with more those are shown that are farthest from the others, and the first."""


@dataclass(frozen=True)
class Shown:
    """One column of a report: a run, or a rank of one."""

    record: RunRecord
    name: str
    snapshot: Snapshot
    facts: dict[str, Any]


def shown_runs(records: Sequence[RunRecord]) -> Iterator[Shown]:
    """What is shown of these runs; raises ValueError for one whose files are damaged."""
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        names = [record.id for record in records]
    for record, name in zip(records, names, strict=True):
        if record.status == "broken":
            raise ValueError(f"the run {record.id} is broken: {record.reason}")
        copy: TemporaryDirectory[str] | None = None
        if (address := address_of(record.path)) is not None:
            copy = fetched(address)
        path = record.path if copy is None else Path(copy.name)
        with open_run(path) as run:
            ranks = run.ranks
            if not ranks:
                snapshot = Snapshot(run)
                yield Shown(record, name, snapshot, run_facts(run, record, name, snapshot))
        if ranks:
            yield from _ranks(path, record, name, ranks)


def _ranks(path: Path, record: RunRecord, name: str, ranks: Sequence[int]) -> Iterator[Shown]:
    found = {}
    for rank in ranks:
        with open_run(path, rank) as run:
            title = f"{name}, rank {rank}"
            snapshot = Snapshot(run)
            found[rank] = Shown(record, title, snapshot, run_facts(run, record, title, snapshot))
    chosen = list(ranks)
    if len(ranks) > _MOST_RANKS:
        apart = ranks_apart({rank: shown.snapshot for rank, shown in found.items()})
        chosen = sorted([ranks[0], *[r for r in apart if r != ranks[0]][: _MOST_RANKS - 1]])
    yield from (found[rank] for rank in chosen)
