"""Plants one fault after the other in copies of the tree, and tells which the tests catch.

    python -m tests.deliberate_faults [NAME ...]

Without names all of ``tests/fault_table.py``. A fault is caught if one of its tests fails with it,
and the same test passes in a copy without it. Exits with 1 if one is not caught.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.fault_table import FAULTS, Fault

ROOT = Path(__file__).resolve().parent.parent

_SECONDS = 900.0  # that the tests of one fault may take
_FAILED = 1  # the exit code of pytest where tests ran and some failed
_PACKAGES = {"passes": "tmm/passes", "runtime": "tmm/runtime"}  # as in pyproject.toml
_FAILURES = Path(".pytest_cache", "v", "cache", "lastfailed")


class FaultError(RuntimeError):
    """A fault of the table that cannot be tried as it stands there."""


def planted(fault: Fault, text: str) -> str:
    """The text of its file with the fault in it; raises ``FaultError`` unless it fits once."""
    found = text.count(fault.sound)
    if found != 1:
        raise FaultError(f"its text stands {found} times in {fault.file}, not once")
    return text.replace(fault.sound, fault.faulty)


def first_failure(fault: Fault) -> str | None:
    """The first test that fails with the fault; None if none does. Raises ``FaultError``."""
    with _copy_of_tree() as copy:
        file = copy / fault.file
        file.write_text(planted(fault, file.read_text()))
        return next(iter(_failures(copy, ("-x", *fault.tests))), None)


def failing_anyway(tests: Sequence[str]) -> list[str]:
    """Those of the tests that fail in a copy without any fault. Raises ``FaultError``."""
    with _copy_of_tree() as copy:
        return _failures(copy, tests)


@contextmanager
def _copy_of_tree() -> Iterator[Path]:
    """What git tracks, as it is now, in a folder that it is imported from."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    with tempfile.TemporaryDirectory(prefix="tmm-fault-") as folder:
        target = Path(folder).resolve()
        for name in filter(None, listed.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
        for source, place in _PACKAGES.items():
            (target / place).symlink_to(target / source, target_is_directory=True)
        yield target


def _failures(copy: Path, arguments: Sequence[str]) -> list[str]:
    options = ["-n0", "-q", "-p", __spec__.name]  # this module: see ``pytest_configure``
    # Compiled code is found by its text. A graph is found by what came in, not by what tmm is.
    environment = os.environ | {
        "PYTHONPATH": str(copy),  # of the processes that tests start, too
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "0",
    }
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *arguments],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise FaultError(f"the tests did not end in {_SECONDS:.0f} s") from error
    if ended.returncode == 0:
        return []
    if ended.returncode != _FAILED:
        raise FaultError(f"the tests did not run:\n{ended.stdout}{ended.stderr}")
    return list(json.loads((copy / _FAILURES).read_text()))


def pytest_configure() -> None:
    """Refuse to test another tmm than that of the copy, such as the installed one."""
    here = Path.cwd().resolve()
    for name in ("tmm", "tmm.passes", "tmm.runtime"):
        file = importlib.import_module(name).__file__
        assert file is not None
        assert Path(file).resolve().is_relative_to(here), f"{name} is that of {file}"


def main(names: Sequence[str]) -> int:
    """Try the faults of these names, or all; gives the exit code."""
    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in names if name not in known]:
        print(f"no such fault: {', '.join(unknown)}; there are {', '.join(known)}")
        return 2
    caught: dict[str, str] = {}
    tried = tuple(names or known)
    for name in tried:
        begin, found, verdict = time.monotonic(), None, "NOT CAUGHT"
        try:
            found = first_failure(known[name])
        except FaultError as error:
            verdict = f"NOT TRIED: {error}"
        if found is not None:
            caught[name], verdict = found, f"caught by {found}"
        print(f"{name:40} {time.monotonic() - begin:4.0f} s  {verdict}", flush=True)
    wrong = failing_anyway(tuple(dict.fromkeys(caught.values()))) if caught else []
    for test in wrong:
        print(f"{test} fails without a fault, too, and catches none")
    missed = [name for name in tried if caught.get(name) in (None, *wrong)]
    print(f"{len(tried) - len(missed)} of {len(tried)} caught", *missed and ["all but", *missed])
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
