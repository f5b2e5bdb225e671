"""The runs in an object store or on another machine, listed without copying them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tmm.runs.artifacts import FOLDER as SAMPLES
from tmm.runs.remote import Store, in_store
from tmm.runs.run_folders import DEPTH, FoundRun, tells_of_run
from tmm.runs.run_record import RunRecord, broken, record_of
from tmm.runs.state import MOST_BYTES as MOST_OF_STATE
from tmm.runs.state import STATE_NAME, State
from tmm.runtime.store.run_file import INFO_NAME, parse_info
from tmm.runtime.store.run_file import MOST_BYTES as MOST_OF_INFO

_AT_ONCE = 500  # files that are asked for together
_VERSIONS = ("etag", "generation", "md5", "md5hash", "content_md5", "sha256", "version_id")
_TIMES = ("mtime", "lastmodified", "last_modified", "modified", "updated", "created")

Known = Callable[[FoundRun], RunRecord | None]


@dataclass(frozen=True)
class _Folder:
    run: FoundRun
    files: Mapping[str, str]  # paths in the store, by name


def list_store(address: str, known: Known) -> list[tuple[FoundRun, RunRecord, bool]]:
    """The runs below an address, by place, and whether each had to be read as it is not ``known``.

    A run that is said to be running on another machine is running: nobody can hold a lock there.

    Raises:
        FileNotFoundError: if there is nothing.
        OSError: if it cannot be read.
        ImportError: if the package of that kind of store is not installed.
        ValueError: for a kind of store that fsspec does not know.
    """
    with in_store(address) as store:
        folders = _folders(address, store)
        records = [known(folder.run) for folder in folders]
        new = [folder for folder, record in zip(folders, records, strict=True) if record is None]
        read = {folder.run.name: record for folder, record in _read(store, new)}
        result = []
        for folder, record in zip(folders, records, strict=True):
            if record is not None:
                result.append((folder.run, record, False))
            elif (found := read.get(folder.run.name)) is not None:
                result.append((folder.run, found, True))
        return result


def _folders(address: str, store: Store) -> list[_Folder]:
    """The folders with a ``run.json``, of which some may be of other programs."""
    inside = store.root.rstrip("/")
    by_folder: dict[str, dict[str, str]] = {}
    for path in store.files:
        if path.startswith(f"{inside}/"):
            folder, _, name = path[len(inside) + 1 :].rpartition("/")
            by_folder.setdefault(folder, {})[name] = path
    found = []
    for folder, files in sorted(by_folder.items()):
        parts = folder.split("/") if folder else []
        is_hidden = any(part.startswith(".") for part in parts) or SAMPLES in parts[1:]
        if INFO_NAME in files and len(parts) <= DEPTH and not is_hidden:
            own = {name: path for name, path in files.items() if tells_of_run(name)}
            stamp, changed = _stamp({name: store.files[path] for name, path in own.items()})
            place = Path(f"{address.rstrip('/')}/{folder}" if folder else address)
            found.append(_Folder(FoundRun(folder, place, stamp, changed), own))
    return found


def _stamp(files: Mapping[str, Mapping[str, Any]]) -> tuple[str, float]:
    """What the store says of the version of each file; empty for one that says nothing of it."""
    parts, changed = [], 0.0
    for name, info in sorted(files.items()):
        said = {key.lower(): value for key, value in info.items()}
        versions = [f"{key} {said[key]}" for key in _VERSIONS if said.get(key)]
        times = [(key, said[key]) for key in _TIMES if said.get(key)]
        if not versions and not times:
            return "", 0.0
        if not versions:  # two of one size, written shortly after each other, may look alike
            changed = max(changed, *(_seconds(value) for _, value in times))
        versions += [f"{key} {value}" for key, value in times]
        parts.append(" ".join((name, str(said.get("size")), *versions)))
    return "\n".join(parts), changed


def _seconds(value: object) -> float:
    """A time in seconds since 1970; infinite for what cannot be told."""
    if isinstance(value, (int, float)):
        return float(value)
    try:
        time = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    except ValueError:
        return float("inf")
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).timestamp()


def _read(store: Store, folders: list[_Folder]) -> list[tuple[_Folder, RunRecord]]:
    """What the small files of runs say; nothing of what is no run."""
    wanted = []
    for folder in folders:
        for name, most in ((INFO_NAME, MOST_OF_INFO), (STATE_NAME, MOST_OF_STATE)):
            path = folder.files.get(name)
            if path is not None and int(store.files[path].get("size") or 0) <= most:
                wanted.append(path)
    texts: dict[str, Any] = {}
    for start in range(0, len(wanted), _AT_ONCE):
        some = wanted[start : start + _AT_ONCE]
        texts |= store.system.cat(some, on_error="return", recursive=False) if some else {}
    found = ((folder, _described(folder, texts)) for folder in folders)
    return [(folder, record) for folder, record in found if record is not None]


def _described(folder: _Folder, texts: Mapping[str, Any]) -> RunRecord | None:
    path = folder.run.path
    try:
        info = parse_info(_text(folder, INFO_NAME, texts), f"{path}/{INFO_NAME}")
    except (ValueError, OSError) as error:
        return broken(record_of(path, {}), error)
    if len(folder.files) == 1 and "starts" not in info:
        return None  # of another program
    if STATE_NAME not in folder.files:
        return record_of(path, info)
    try:
        state = State.told(_text(folder, STATE_NAME, texts), f"{path}/{STATE_NAME}")
    except (ValueError, OSError) as error:
        return broken(record_of(path, info), error)
    return record_of(path, info, state)


def _text(folder: _Folder, name: str, texts: Mapping[str, Any]) -> bytes:
    text = texts.get(folder.files[name])
    if isinstance(text, bytes):
        return text
    if text is None:
        raise ValueError(f"{folder.run.path}/{name} is longer than such a file is")
    raise OSError(f"{folder.run.path}/{name} cannot be read: {text!r}")
