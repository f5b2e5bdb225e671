"""A run as a list shows it, made of the small files in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tmm.runs.recorded_run import open_run
from tmm.runs.remote import address_of
from tmm.runs.state import State, Status, parsed_time
from tmm.runtime.store.run_file import read_info

_MOST_REASON = 500  # characters


@dataclass(frozen=True)
class RunRecord:
    """A run as a list shows it.

    ``status`` is "broken" for a run whose files cannot be read; ``reason`` says why it is that, or
    failed, or was stopped. Times are in UTC; ``ended`` is None as long as it is running, and for a
    run that crashed. ``steps`` is None for a run in a store that is listed: nothing is copied
    to count them.
    """

    id: str
    project: str
    name: str
    path: Path
    status: Status
    reason: str = ""
    config: dict[str, Any] | None = None
    tags: tuple[str, ...] = ()
    notes: str = ""
    started: datetime | None = None
    ended: datetime | None = None
    last_step: int | None = None
    steps: int | None = None

    @property
    def seconds(self) -> float | None:
        """How long it took; None for a run whose end is not known."""
        if self.started is None or self.ended is None:
            return None
        return (self.ended - self.started).total_seconds()

    @property
    def address(self) -> str:
        """The path as text, for a run in a store its address, such as ``s3://bucket/runs/gpt``."""
        return address_of(self.path) or str(self.path)


def describe_run(path: Path) -> RunRecord:
    """What the small files of a run say; it is broken if they say what cannot be."""
    try:
        info = read_info(path)
    except (ValueError, OSError) as error:
        return broken(record_of(path, {}), error)
    try:
        state = State.read(path)
    except (ValueError, OSError) as error:
        return broken(record_of(path, info), error)
    return record_of(path, info, state)


def record_of(path: Path, info: Mapping[str, Any], state: State | None = None) -> RunRecord:
    """A run of which ``run.json`` and ``state.json`` say this; it may have no state."""
    start = (info.get("starts") or [{}])[0].get("time")
    if state is None:  # recorded by tmm.instrument(run=path) alone, which keeps no state
        state = State("finished", str(start or ""))
    return RunRecord(
        id=str(info.get("id", path.name)),
        project=str(info.get("project", path.parent.name)),
        name=str(info.get("name", path.name)),
        path=path,
        config=dict(info.get("config") or {}),
        tags=tuple(info.get("tags") or ()),
        notes=str(info.get("notes", "")),
        started=parsed_time(str(start or state.started)),
        ended=parsed_time(state.ended),
        last_step=state.last_step,
        **_said(state),
    )


def said_now(record: RunRecord) -> RunRecord:
    """The same run, with what its state says now: for one whose process may be gone, or be back."""
    try:
        state = State.read(record.path)
    except (ValueError, OSError) as error:
        return broken(record, error)
    return record if state is None else replace(record, **_said(state))


def _said(state: State) -> dict[str, Any]:
    return {"status": state.status, "reason": state.reason[:_MOST_REASON]}


def broken(record: RunRecord, error: Exception) -> RunRecord:
    """The same run as one that cannot be read."""
    reason = str(error) or type(error).__name__
    return replace(record, status="broken", reason=reason[:_MOST_REASON])


def count_steps(record: RunRecord) -> RunRecord:
    """With the steps that its segments hold; broken if they cannot be read."""
    if record.status == "broken" or record.steps is not None or address_of(record.path):
        return record
    try:
        with open_run(record.path) as run:
            steps = run.steps
    except (ValueError, OSError) as error:
        return broken(record, error)
    last = int(steps[-1]) if len(steps) else record.last_step
    return replace(record, steps=len(steps), last_step=last)


def age_key(record: RunRecord) -> tuple[datetime, str]:
    """What orders runs: when they started, or when their folder last changed."""
    if record.started is not None:
        return record.started, record.id
    try:
        changed = datetime.fromtimestamp(record.path.stat().st_mtime, UTC)
    except (OSError, ValueError, OverflowError):  # it is gone, or the file system makes things up
        changed = datetime.min.replace(tzinfo=UTC)
    return changed, record.id
