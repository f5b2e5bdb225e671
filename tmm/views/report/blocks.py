"""The metrics of layers as a page holds them: reduced on one scale for all runs, and packed."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tmm.core.metrics import FloatArray
from tmm.views.plots.groups import Group
from tmm.views.plots.reduce import Reduced, reduce_table, worst_of
from tmm.views.plots.scale import SHARES, scale_for
from tmm.views.report.snapshot import Snapshot

_MOST_COLUMNS = (400, 300, 200, 150, 100, 70, 50, 30, 20)
_MOST_VALUES = 4_400_000  # of all heat maps of a page; some 10 MB
_MOST_WHOLE_VALUES = 800_000  # that may keep all digits of a float32; some 4 MB
_LARGEST = 3.4e38  # of float32, less than its end, so that rounding stays finite
_SMALLEST = float(np.finfo(np.float32).tiny)
_DROPPED_BITS = 10  # of the 23 of a float32's fraction; 4 digits are left


@dataclass(frozen=True, eq=False)
class Block:
    """One group of one run, reduced; with all digits of a float32, or with four."""

    run: int
    group: Group
    reduced: Reduced
    is_exact: bool

    @property
    def data(self) -> str:
        """Its values for the page."""
        reduced = self.reduced
        rounded = float32 if self.is_exact else four_digits
        low, high = rounded(reduced.low), rounded(reduced.high)
        if reduced.is_whole:
            return packed(low, reduced.flags)
        return packed(low, high, reduced.flags)

    def description(self, name: str) -> dict[str, Any]:
        """What the page knows of it without its values; ``name`` is that of their element."""
        reduced, group = self.reduced, self.group
        which = worst_of(group.family, group.metric)
        return {
            "run": self.run,
            "group": group.name,
            "data": name,
            "keys": group.keys,
            "labels": group.labels,
            "layers": group.layers,
            "first": reduced.first.tolist(),
            "last": reduced.last.tolist(),
            "whole": reduced.is_whole,
            "note": reduced.note(which),
            "shows": reduced.value_shown(which),
        }


def reduced_blocks(snapshots: list[Snapshot], groups: list[tuple[Group, ...]]) -> list[Block]:
    """All groups of all runs, with as many columns as the page has room for."""
    keys = sum(len(group.keys) for of_run in groups for group in of_run)
    longest = max((len(snapshot.steps) for snapshot in snapshots), default=0)

    def values(columns: int) -> int:
        return keys * (longest if longest <= columns else 2 * columns)

    fitting = (columns for columns in _MOST_COLUMNS if values(columns) <= _MOST_VALUES)
    columns = next(fitting, _MOST_COLUMNS[-1])
    is_exact = values(columns) <= _MOST_WHOLE_VALUES
    return [
        Block(run, group, reduce_table(*snapshot.table(group.keys), columns), is_exact)
        for run, (snapshot, of_run) in enumerate(zip(snapshots, groups, strict=True))
        for group in of_run
    ]


def scales(blocks: list[Block]) -> Mapping[str, dict[str, Any]]:
    """By the name of a group: its family and metric, and how its values become colours."""
    members: dict[str, list[Block]] = {}
    for block in blocks:
        members.setdefault(block.group.name, []).append(block)
    found = {}
    for name, of_group in members.items():
        group = of_group[0].group
        which = worst_of(group.family, group.metric)
        linear = bool({group.family, group.metric} & SHARES)
        worst = [block.reduced.worst(which) for block in of_group]
        found[name] = {
            "family": group.family,
            "metric": group.metric,
            "worst": which,
            "scale": asdict(scale_for(worst, linear=linear)),
        }
    return found


def packed(*parts: npt.NDArray[Any]) -> str:
    """Arrays one after the other, compressed, in base64.

    The bytes of each are sorted by their place in a number, which compresses far better.
    """
    data = b"".join(
        np.ascontiguousarray(part).reshape(-1, 1).view(np.uint8).T.tobytes() for part in parts
    )
    return _text(data)


def packed_json(value: object) -> str:
    """Data in the types of JSON, compressed, in base64."""
    return _text(json.dumps(value, separators=(",", ":"), allow_nan=False).encode())


def float32(values: FloatArray) -> npt.NDArray[np.float32]:
    """As float32; finite numbers stay finite, and others than zero stay that."""
    clipped = np.clip(values, -_LARGEST, _LARGEST)
    tiny = (clipped != 0) & (np.abs(clipped) < _SMALLEST)
    return np.where(tiny, np.copysign(_SMALLEST, clipped), clipped).astype(np.float32)


def four_digits(values: FloatArray) -> npt.NDArray[np.float32]:
    """As `float32`, rounded to four digits, which compresses better."""
    exact = float32(values)
    half, kept = np.uint32(1 << (_DROPPED_BITS - 1)), np.uint32(2**32 - (1 << _DROPPED_BITS))
    rounded = ((exact.view(np.uint32) + half) & kept).view(np.float32)
    return np.where(np.isnan(exact), exact, rounded)


def _text(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode("ascii")
