"""Passes whose rows nobody wants: what is measured in them is not read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tmm.kernels.ops import drop_rows


@contextmanager
def rows_dropped(dropped: bool) -> Iterator[None]:
    """Tell ``tmm::summarize`` and ``tmm::summarize_into`` whether what they give is dropped.

    Those in C++ then read no tensor in this thread, and their rows are NaN.
    """
    before = drop_rows(dropped)
    try:
        yield
    finally:
        drop_rows(before)
