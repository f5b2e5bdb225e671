"""The runs under a root: listed, found, deleted."""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from pathlib import Path

from tmm.runs.at_once import do_all
from tmm.runs.deletion import delete_folder
from tmm.runs.remote import address_of, fetched, without_scheme
from tmm.runs.run_folders import FoundRun, found_runs, is_run
from tmm.runs.run_index import RunIndex
from tmm.runs.run_record import RunRecord, age_key, count_steps, describe_run, said_now
from tmm.runs.state import STATUSES, Status
from tmm.runs.store_listing import list_store

_UNSETTLED = ("running", "crashed")  # of which the process may be gone, or another one be there


def list_runs(
    root: str | os.PathLike[str] = "runs",
    *,
    project: str | None = None,
    status: Status | None = None,
    tag: str | None = None,
    limit: int | None = None,
) -> tuple[RunRecord, ...]:
    """The runs under ``root``, newest first, at most ``limit``. Broken ones are listed as such.

    ``root`` may be an address that fsspec knows, such as ``s3://bucket/runs``. What was read of
    many runs is kept for the next time, in a folder of this user (``TMM_INDEX`` names another one);
    a run whose files have changed is read again.

    Raises ``FileNotFoundError`` where there is no such folder, ``ValueError`` for a status that no
    run has, and what `open_run` raises for an address.
    """
    if status is not None and status not in STATUSES:
        raise ValueError(f"status={status!r} is none of {', '.join(STATUSES)}")
    if address_of(root) is None and not without_scheme(root).is_dir():
        raise FileNotFoundError(f"root={str(root)!r} is no folder")
    runs = _Runs(root)
    wanted = [
        record
        for record in sorted(runs.records, key=age_key, reverse=True)
        if project in (None, record.project)
        and (tag is None or tag in record.tags)
        and status in (None, "broken", record.status)  # counting its steps may show that it is
    ]
    chosen: list[RunRecord] = []
    while wanted and (limit is None or len(chosen) < limit):
        some = wanted if limit is None else wanted[: limit - len(chosen)]
        wanted = wanted[len(some) :]
        chosen += [record for record in runs.counted(some) if status in (None, record.status)]
    runs.save()
    return tuple(chosen)


def find_run(query: str | os.PathLike[str], root: str | os.PathLike[str] = "runs") -> RunRecord:
    """The run with that path, id or name, or the only one whose id begins so.

    Of several runs of one name it is the newest; at an address such as ``s3://bucket/runs/gpt`` a
    copy that lasts until the process ends. Raises ``LookupError``, which names the nearest.
    """
    text = os.fspath(query)
    if (address := address_of(query)) is not None:
        text = _copy(address)
    place = os.path.expanduser(without_scheme(text))
    is_path = os.sep in text or text.startswith((".", "~"))
    if is_path and (path := Path(os.path.realpath(place))).is_dir():
        if not is_run(path, os.listdir(path)):
            raise LookupError(f"{text!r} is not the folder of a run")
        return count_steps(describe_run(path))
    runs = _Runs(root)
    exact = [path for path in runs.paths if path.name == text]
    begins = [path for path in runs.paths if text and path.name.startswith(text)]
    if len(exact) == 1 or (not exact and len(begins) == 1):
        return _whole((exact or begins)[0])
    records = runs.records
    runs.save()
    named = [record for record in records if record.name == text]
    if named:
        return _whole(max(named, key=lambda record: (record.started is not None, record.id)).path)
    if len(begins) > 1:
        raise LookupError(f"{text!r} begins the ids of {len(begins)} runs; give more of it")
    names = [name for record in records for name in (record.id, record.name)]
    near = get_close_matches(text, names, n=3)
    hint = f"; the nearest are {', '.join(near)}" if near else ""
    raise LookupError(f"no run {text!r} among the {len(records)} under {str(root)!r}{hint}")


def delete_run(record: RunRecord, root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Delete a run under ``root``, and its folder if nothing else is in it.

    Gives the names of what is in the folder and is not the run's, such as other runs: it stays.

    Raises ``ValueError`` for one that is running, for a folder outside of ``root``, and for one in
    a store, where nobody can be kept from going on with it meanwhile.
    """
    if address_of(root) is not None:
        raise ValueError(f"runs under {root} cannot be deleted here: use a tool of the store")
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
    if address_of(root) is not None:
        raise ValueError(f"runs under {root} cannot be deleted here: use a tool of the store")
    before = datetime.now(UTC) - older_than
    return tuple(
        record
        for record in list_runs(root)
        if record.status != "running"
        and record.started is not None
        and record.started < before
        and not (keep_tagged and record.tags)
    )


class _Runs:
    """The runs under a root; what is known of them from before is not read again."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._address = address_of(root)
        folder = without_scheme(root)
        # Runs that know no project are of the one that their folder's parent is called.
        identity = self._address or f"{os.path.realpath(folder)}\n{folder.name}"
        self._index = RunIndex(identity)
        self._found: list[FoundRun] = []
        self._records: list[RunRecord] | None = None
        if self._address is not None:
            self._records = self._listed(self._address)
        elif folder.is_dir():
            self._found = found_runs(folder)
        self._by_path = {run.path: run for run in self._found}

    @property
    def paths(self) -> list[Path]:
        """The folders."""
        return [run.path for run in self._found]

    @property
    def records(self) -> list[RunRecord]:
        """What is said of each, maybe without its steps."""
        if self._records is None:
            known = [self._index.known(run) for run in self._found]
            pairs = list(zip(self._found, known, strict=True))
            new = [run for run, record in pairs if record is None]
            read = iter(do_all(lambda run: describe_run(run.path), new))
            self._records = []
            for run, record in pairs:
                if record is None:
                    record = next(read)
                    self._index.keep(run, record)
                elif record.status in _UNSETTLED:
                    record = said_now(record)
                self._records.append(record)
        return self._records

    def counted(self, records: Sequence[RunRecord]) -> list[RunRecord]:
        """The same with their steps, where those can be counted."""
        result = do_all(count_steps, records)
        for before, record in zip(records, result, strict=True):
            if before.steps is None and record.steps is not None:
                self._index.keep(self._by_path[record.path], record)
        return result

    def save(self) -> None:
        """Keep what is known for the next time."""
        self._index.save(self._found)

    def _listed(self, address: str) -> list[RunRecord]:
        records = []
        for run, record, is_new in list_store(address, self._index.known):
            self._found.append(run)
            records.append(record)
            if is_new:
                self._index.keep(run, record)
        return records


def _whole(path: Path) -> RunRecord:
    """The run at a path, or a copy of the one at an address, with its steps."""
    address = address_of(path)
    here = path if address is None else Path(_copy(address))
    return count_steps(describe_run(here))


def _copy(address: str) -> str:
    copy = fetched(address)
    atexit.register(copy.cleanup)  # whoever asks reads it later
    return copy.name
