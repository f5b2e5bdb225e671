"""One part of a run on a device, by itself: ``process NAME DEVICE FILE SECONDS [toy]``.

Each finding is appended to the file as soon as it is there, so that those before a crash, or before
the end of the time, are kept.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.on_gpu.findings import append
from benchmarks.on_gpu.parts import part_named
from benchmarks.on_gpu.subjects import Subject


def main(arguments: Sequence[str]) -> None:
    """Run the part."""
    name, device, file, seconds, *rest = arguments
    path = Path(file)
    subject = Subject(device, float(seconds), toy=rest == ["toy"])
    for finding in part_named(name).run(subject, path.parent):
        append(path, finding)


if __name__ == "__main__":
    main(sys.argv[1:])
