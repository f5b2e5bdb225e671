"""Whether a run still goes on."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tmm.runs.state import State, is_running, parsed_time


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    ``status`` is one of ``tmm.runs.state.STATUSES``; of a run that ``tmm.start_run`` did not start,
    and which therefore says nothing of itself, whether its process is "alive", "gone" or, on
    another machine, "unknown". ``seconds`` is how long it has taken since its last start; None
    where that is not known. ``is_over`` tells that nobody records it any more.
    """

    status: str
    reason: str
    seconds: float | None
    is_over: bool


def standing(path: Path, info: Mapping[str, Any]) -> Standing:
    """How the run in the folder ``path`` stands; ``info`` is its ``run.json``.

    Raises ValueError where what it says of itself is damaged.
    """
    state = State.read(path)
    if state is not None and state.status == "crashed":
        # It may have ended between the look at its file and that at its lock, in this order.
        state = State.read(path)
    if state is None:
        return _of_process(info)
    end = parsed_time(state.ended) if state.ended else datetime.now(UTC)
    start = parsed_time(state.started)
    known = state.status != "crashed" and start is not None and end is not None
    seconds = (end - start).total_seconds() if known and start and end else None
    return Standing(state.status, state.reason, seconds, state.status != "running")


def _of_process(info: Mapping[str, Any]) -> Standing:
    last = (info.get("starts") or [{}])[-1]
    process, start = last.get("process"), parsed_time(str(last.get("time")))
    if last.get("host") != platform.node() or type(process) is not int or process <= 0:
        return Standing("unknown", "its process is on another machine", None, False)
    if not is_running(process):
        return Standing("gone", "", None, True)
    seconds = None if start is None else (datetime.now(UTC) - start).total_seconds()
    return Standing("alive", "", seconds, False)
