"""One HDF5 file of a run, readable by others while it grows and after its writer was killed.

A file holds these datasets and nothing else, because SWMR mode allows no new ones:

===================  ==================  ==========================================================
``steps``            rows                int64; the commit marker: a row counts once it is here
``commits``          rows x 10           int64, see `COMMIT_FIELDS`; written before ``steps`` grows
``values``           some rows x keys    float64, `ABSENT` where a key was not measured
``keys``             bytes               UTF-8 JSON, one line per column of ``values``
``few_values``       some rows x keys    as ``values``, of keys that came in a small table
``few_keys``         bytes               UTF-8 JSON, one line per column of ``few_values``
``histograms``       rows x keys x bins  float64, `ABSENT` where a key was not measured
``histogram_keys``   bytes               UTF-8 JSON, one line per column of ``histograms``
``histogram_edges``  edges               float64, only where the run has them
``events``           bytes               UTF-8 JSON, one line per event
===================  ==================  ==========================================================

Its attributes are ``format`` and, where a run went back to an earlier step, ``replaces_from``: the
steps from that one on in earlier segments no longer count.

A run whose ranks each record their own rows has segments of each, `rank-0.metrics-001.h5` and so
on: those of one rank follow one another, and stand beside those of the others.

Text is kept as bytes because SWMR mode cannot grow variable-length strings. ``values``,
``few_values`` and ``histograms`` have rows of those steps only that have values for them: a row of
``commits`` says how many there were after it. ``few_values`` is apart since a loss that is logged
in each step would fill a wide row each time.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tmm.core.metrics import FloatArray

FORMAT = 2
COMMIT_FIELDS = (
    "step",
    "measured",
    "file_bytes",
    "key_bytes",
    "few_key_bytes",
    "histogram_key_bytes",
    "event_bytes",
    "rows",
    "few_rows",
    "histogram_rows",
)
MATRICES = {"values": "keys", "few_values": "few_keys", "histograms": "histogram_keys"}
"""Datasets of values, and those that name their columns."""

ABSENT_BITS = np.uint64(0x7FF8616273656E74)  # a quiet NaN whose payload says "absent" in ASCII
ABSENT = ABSENT_BITS.view(np.float64)

_NAME = re.compile(r"(?:rank-(\d{1,9})\.)?metrics-(\d{3,})\.h5")


def is_measured(values: FloatArray) -> npt.NDArray[np.bool_]:
    """Tell which of ``values``, shape (n,) or (n, bins), were measured, as shape (n,)."""
    measured = values.view(np.uint64) != ABSENT_BITS
    whole: npt.NDArray[np.bool_] = measured.all(axis=tuple(range(1, values.ndim)))
    return whole


def is_segment(name: str) -> bool:
    """Tell whether a file of that name is a segment."""
    return _NAME.fullmatch(name) is not None


def segment_name(number: int, rank: int | None) -> str:
    """Return what a segment is called, of a run that one process records, or of one rank of it."""
    return f"{'' if rank is None else f'rank-{rank}.'}metrics-{number:03d}.h5"


def numbers_of(path: Path) -> tuple[int, int | None]:
    """Return the number of a segment, and the rank that recorded it into a run of several."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[2]), None if match[1] is None else int(match[1])


def segment_paths(folder: Path) -> list[Path]:
    """Return the segments in ``folder``, oldest first; files still being created are left out."""
    paths = (folder / name for name in os.listdir(folder) if is_segment(name))
    return sorted(paths, key=lambda path: (*_places(path), path.name))


def _places(path: Path) -> tuple[int, int]:
    number, rank = numbers_of(path)
    return number, -1 if rank is None else rank
