"""What was read of many runs, kept for the next list of them.

An index saves reading; it is never asked what runs there are, nor about a run whose files have
changed. It lies in a folder of the user who made it, since it repeats what files of runs say that
others may not be allowed to read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from tmm.core.atomic_file import replacing
from tmm.runs.run_folders import FoundRun
from tmm.runs.run_record import RunRecord
from tmm.runtime.store.untrusted import parse_json, read_file

VARIABLE = "TMM_INDEX"
"""Names the folder of indexes; an empty one says that there are to be none."""

FORMAT = 1
_WORTH = 32  # runs that had to be read, from which on that is kept
_SETTLED_SECONDS = 60.0  # since a run was written; clocks of machines may differ as much
_MOST_BYTES = 256 << 20
_MOST_OF_RUN = 64 << 10  # characters: longer configurations are read each time
_TIMES = ("started", "ended")


class RunIndex:
    """What is known of runs, each as long as its files are the same.

    A file that is damaged, of another root or of another version counts as none, and one that
    cannot be written is left out.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._file = _file_of(root)
        self._lines = {} if self._file is None else _read(self._file, root)
        self._new = 0
        self._began = time.time()

    def known(self, run: FoundRun) -> RunRecord | None:
        """What was read of a run, if it is the same since; its process may have ended, or begun."""
        line = self._lines.get(run.name)
        if line is None or not run.stamp or line[0] != run.stamp:
            return None
        return _record(line[1], run.path)

    def keep(self, run: FoundRun, record: RunRecord) -> None:
        """Keep what was read of a run, once it is not about to change, and can be read by all."""
        is_settled = run.changed < self._began - _SETTLED_SECONDS
        # What is called the root itself depends on how somebody writes its path.
        if (
            not run.name
            or not run.stamp
            or not is_settled
            or record.status in ("running", "broken")
        ):
            return
        said = _plain(record)
        if len(json.dumps(said)) <= _MOST_OF_RUN:
            self._lines[run.name] = [run.stamp, said]
            self._new += 1

    def save(self, found: Iterable[FoundRun]) -> None:
        """Write what is known of these runs, if it is much more than was known before."""
        if self._file is None or self._new < _WORTH:
            return
        lines = {run.name: self._lines[run.name] for run in found if run.name in self._lines}
        body = json.dumps({"root": self._root, "runs": lines}).encode()
        head = json.dumps({"format": FORMAT, "sum": _sum(body)}).encode()
        with suppress(OSError):
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with replacing(self._file) as temporary:
                temporary.touch(mode=0o600)
                temporary.write_bytes(head + b"\n" + body)
            self._new = 0


def _file_of(root: str) -> Path | None:
    """Where the index of a root lies; None for nowhere."""
    folder = os.environ.get(VARIABLE)
    if folder == "":
        return None
    if folder is None:
        caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folder = os.path.join(caches, "tmm", "runs")
    # Somebody without a home has none.
    return Path(folder, f"{_sum(root.encode())}.json") if os.path.isabs(folder) else None


def _read(file: Path, root: str) -> dict[str, list[Any]]:
    """Stamp and description of each run, by its name; none of what is not as it was written."""
    try:
        head, _, body = read_file(file, _MOST_BYTES).partition(b"\n")
        said = parse_json(head)
        if not isinstance(said, dict) or said != {"format": FORMAT, "sum": _sum(body)}:
            return {}
        content = parse_json(body)
    except (OSError, ValueError):
        return {}
    runs: dict[str, list[Any]] = content["runs"] if content["root"] == root else {}
    return runs


def _plain(record: RunRecord) -> dict[str, Any]:
    said = {field.name: getattr(record, field.name) for field in fields(record)}
    del said["path"]
    return said | {name: _text(said[name]) for name in _TIMES}


def _record(said: Mapping[str, Any], path: Path) -> RunRecord:
    times = {name: said[name] and datetime.fromisoformat(said[name]) for name in _TIMES}
    return RunRecord(**{**said, **times, "tags": tuple(said["tags"]), "path": path})


def _text(when: datetime | None) -> str | None:
    return None if when is None else when.isoformat()


def _sum(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
