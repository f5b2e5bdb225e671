"""The folders of runs under a root, and marks by which one sees that a run has changed."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from tmm.runs.artifacts import FOLDER as SAMPLES
from tmm.runs.at_once import do_all
from tmm.runs.state import STATE_NAME
from tmm.runtime.store.run_file import INFO_NAME, is_info
from tmm.runtime.store.segment_layout import is_segment

DEPTH = 4
"""How many folders lie between a root and a run at most."""


@dataclass(frozen=True)
class FoundRun:
    """The folder of a run. ``name`` is its place below the root, with slashes.

    ``stamp`` is another text after any change of its files; empty where that cannot be known.
    ``changed`` is when the newest of them was written, in seconds since 1970.
    """

    name: str
    path: Path
    stamp: str
    changed: float


def found_runs(root: Path) -> list[FoundRun]:
    """The folders of runs, also of runs within others; links are not followed."""
    found: list[FoundRun] = []
    level = [""]
    for depth in range(DEPTH + 1):
        looked = do_all(lambda name: _look(root, name), level)
        found += [run for run, _ in looked if run is not None]
        level = [name for _, folders in looked for name in folders] if depth < DEPTH else []
    return sorted(found, key=lambda run: run.name)


def is_run(path: Path, names: Collection[str]) -> bool:
    """Whether a folder with files of these names is a run's, maybe a broken one's."""
    if STATE_NAME in names or any(map(is_segment, names)):
        return True
    return INFO_NAME in names and is_info(path)


def tells_of_run(name: str) -> bool:
    """Whether a list shows something of a file of that name."""
    return name in (INFO_NAME, STATE_NAME) or is_segment(name)


def _look(root: Path, name: str) -> tuple[FoundRun | None, list[str]]:
    """The run in a folder, and the folders in which others may lie."""
    place = os.path.join(root, name) if name else os.fspath(root)
    try:
        with os.scandir(place) as found:
            entries = {entry.name: entry for entry in found}
    except OSError:
        return None, []
    run, parts = None, set[str]()
    if INFO_NAME in entries and is_run(path := Path(place), entries):
        stamp, changed = _stamp(entries)
        run, parts = FoundRun(name, path, stamp, changed), {SAMPLES}
    prefix = f"{name}/" if name else ""
    return run, [
        prefix + entry.name
        for entry in entries.values()
        if not entry.name.startswith(".")
        and entry.name not in parts
        and entry.is_dir(follow_symlinks=False)
    ]


def _stamp(entries: Mapping[str, os.DirEntry[str]]) -> tuple[str, float]:
    """Size, times and number of each file that tells of a run, and when the newest was written.

    The time of change, which nobody can set, and the number of the file tell of one that has taken
    the place of another one, also with an older date.
    """
    parts, changed = [], 0.0
    for name in sorted(filter(tells_of_run, entries)):
        try:
            status = entries[name].stat()
        except OSError:
            return "", 0.0
        times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
        parts.append(f"{name} {status.st_size} {times} {status.st_ino}")
        changed = max(changed, status.st_mtime)
    return "\n".join(parts), changed
