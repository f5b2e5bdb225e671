"""The runs under a root: listed, found, deleted."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tmm.runs.artifacts import FOLDER as SAMPLES
from tmm.runs.deletion import delete_folder
from tmm.runs.recorded_run import open_run
from tmm.runs.remote import fetched, is_remote, without_scheme
from tmm.runs.state import STATE_NAME, STATUSES, State, Status, parsed_time
from tmm.runtime.store.run_file import INFO_NAME, is_info, read_info
from tmm.runtime.store.segment_layout import is_segment

_DEPTH = 4  # folders below a root
_MOST_REASON = 500  # characters


@dataclass(frozen=True)
class RunRecord:
    """A run as a list shows it.

    ``status`` is "broken" for a run whose files cannot be read; ``reason`` says why it is that, or
    failed, or was stopped. Times are in UTC; ``ended`` is None as long as it is running, and for a
    run that crashed.
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


def list_runs(
    root: str | os.PathLike[str] = "runs",
    *,
    project: str | None = None,
    status: Status | None = None,
    tag: str | None = None,
    limit: int | None = None,
) -> tuple[RunRecord, ...]:
    """The runs under ``root``, newest first, at most ``limit``. Broken ones are listed as such.

    Raises ``FileNotFoundError`` where there is no such folder, ``ValueError`` for a status that no
    run has.
    """
    if status is not None and status not in STATUSES:
        raise ValueError(f"status={status!r} is none of {', '.join(STATUSES)}")
    if not Path(root).is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is no folder")
    records = sorted(map(_described, _folders(Path(root))), key=_when, reverse=True)
    chosen: list[RunRecord] = []
    for record in records:
        if limit is not None and len(chosen) >= limit:
            break
        if project not in (None, record.project) or (tag is not None and tag not in record.tags):
            continue
        record = _counted(record)
        if status in (None, record.status):
            chosen.append(record)
    return tuple(chosen)


def find_run(query: str | os.PathLike[str], root: str | os.PathLike[str] = "runs") -> RunRecord:
    """The run with that path, id or name, or the only one whose id begins so.

    Of several runs of one name it is the newest; at an address such as ``s3://bucket/runs/gpt`` a
    copy that lasts until the process ends. Raises ``LookupError``, which names the nearest.
    """
    text = os.fspath(query)
    if is_remote(text):
        copy = fetched(text)
        atexit.register(copy.cleanup)  # whoever asks reads it later
        text = copy.name
    place = os.path.expanduser(without_scheme(text))
    is_path = os.sep in text or text.startswith((".", "~"))
    if is_path and (path := Path(os.path.realpath(place))).is_dir():
        if not _is_run(path, os.listdir(path)):
            raise LookupError(f"{text!r} is not the folder of a run")
        return _counted(_described(path))
    folders = list(_folders(Path(root))) if Path(root).is_dir() else []
    exact = [folder for folder in folders if folder.name == text]
    begins = [folder for folder in folders if text and folder.name.startswith(text)]
    if len(exact) == 1 or (not exact and len(begins) == 1):
        return _counted(_described((exact or begins)[0]))
    records = [_described(folder) for folder in folders]
    named = [record for record in records if record.name == text]
    if named:
        return _counted(max(named, key=lambda record: (record.started is not None, record.id)))
    if len(begins) > 1:
        raise LookupError(f"{text!r} begins the ids of {len(begins)} runs; give more of it")
    names = [name for record in records for name in (record.id, record.name)]
    near = get_close_matches(text, names, n=3)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise LookupError(f"no run {text!r} among the {len(records)} under {str(root)!r}{hint}")


def delete_run(record: RunRecord, root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Delete a run under ``root``, and its folder if nothing else is in it.

    Gives the names of what is in the folder and is not the run's, such as other runs: it stays.

    Raises ``ValueError`` for one that is running, and for a folder outside of ``root``.
    """
    if record.status == "running":
        raise ValueError(f"the run {record.id} is running; stop it first")
    path, within = record.path.resolve(), Path(root).resolve()
    if not path.is_relative_to(within):
        raise ValueError(f"{record.path} lies outside of {root}; give --root, or delete it by hand")
    if record.path.is_symlink():
        record.path.unlink()
        return ()
    return delete_folder(record.path, keeps_folder=path == within)


def runs_to_prune(
    root: str | os.PathLike[str], older_than: timedelta, *, keep_tagged: bool = False
) -> tuple[RunRecord, ...]:
    """The runs that started longer ago than ``older_than``; never one that is running."""
    before = datetime.now(UTC) - older_than
    return tuple(
        record
        for record in list_runs(root)
        if record.status != "running"
        and record.started is not None
        and record.started < before
        and not (keep_tagged and record.tags)
    )


def _folders(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The folders of runs, also of runs within others; links are not followed."""
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        return
    names = [entry.name for entry in entries]
    is_run = INFO_NAME in names and _is_run(root, names)
    if is_run:
        yield root
    for entry in entries:
        is_part = entry.name.startswith(".") or (is_run and entry.name == SAMPLES)
        if depth and not is_part and entry.is_dir(follow_symlinks=False):
            yield from _folders(Path(entry.path), depth - 1)


def _is_run(path: Path, names: Sequence[str]) -> bool:
    """Whether a folder with files of these names is a run's, maybe a broken one's."""
    if STATE_NAME in names or any(map(is_segment, names)):
        return True
    return INFO_NAME in names and is_info(path)


def _described(path: Path) -> RunRecord:
    """What the small files of a run say; it is broken if they say what cannot be."""
    try:
        info = read_info(path)
    except (ValueError, OSError) as error:
        return _broken(_record(path, {}), error)
    try:
        state = State.read(path)
    except (ValueError, OSError) as error:
        return _broken(_record(path, info), error)
    return _record(path, info, state)


def _record(path: Path, info: Mapping[str, Any], state: State | None = None) -> RunRecord:
    start = (info.get("starts") or [{}])[0].get("time")
    if state is None:  # recorded by tmm.instrument(run=path) alone, which keeps no state
        state = State("finished", str(start or ""))
    return RunRecord(
        id=str(info.get("id", path.name)),
        project=str(info.get("project", path.parent.name)),
        name=str(info.get("name", path.name)),
        path=path,
        status=state.status,
        reason=state.reason[:_MOST_REASON],
        config=dict(info.get("config") or {}),
        tags=tuple(info.get("tags") or ()),
        notes=str(info.get("notes", "")),
        started=parsed_time(str(start or state.started)),
        ended=parsed_time(state.ended),
        last_step=state.last_step,
    )


def _broken(record: RunRecord, error: Exception) -> RunRecord:
    reason = str(error) or type(error).__name__
    return replace(record, status="broken", reason=reason[:_MOST_REASON])


def _counted(record: RunRecord) -> RunRecord:
    """With the steps that its segments hold; broken if they cannot be read."""
    if record.status == "broken":
        return record
    try:
        with open_run(record.path) as run:
            steps = run.steps
    except (ValueError, OSError) as error:
        return _broken(record, error)
    last = int(steps[-1]) if len(steps) else record.last_step
    return replace(record, steps=len(steps), last_step=last)


def _when(record: RunRecord) -> tuple[datetime, str]:
    """What orders runs: when they started, or when their folder last changed."""
    if record.started is not None:
        return record.started, record.id
    try:
        changed = datetime.fromtimestamp(record.path.stat().st_mtime, UTC)
    except (OSError, ValueError, OverflowError):  # it is gone, or the file system makes things up
        changed = datetime.min.replace(tzinfo=UTC)
    return changed, record.id
