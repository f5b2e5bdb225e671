"""The bill as lines with goals, and as a table of one row per variant."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rich.table import Table

from benchmarks.bill.variants import Goals, Variant
from benchmarks.report import Line, with_goal
from benchmarks.timing import Timing

COLD, WARM, FRESH = "cold cache", "warm cache", "first run on a machine"
FIRST, ALL = "first step", "all steps"
Found = Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]
"""What processes found, by variant and kind of cache; one for each round."""


def lines_of(
    task: str, variants: Sequence[Variant], found: Found, failed: Mapping[str, str]
) -> list[Line]:
    """Four times and the memory of each variant, as ratios to the first one in the same rounds."""
    lines, base = [], found[variants[0].name]
    for variant in variants:
        if variant.name in failed:
            lines.append(Line(f"{task}: {variant.name}", note=failed[variant.name]))
            continue
        for kind, runs in found[variant.name].items():
            beside = base[COLD if kind == FRESH else kind]
            for what, key in ((FIRST, "first_step"), (ALL, "all_steps")):
                line = _time(f"{task}: {variant.name}, {what}, {kind}", runs, beside, key)
                goal = _goal(variant.goals, what, kind)
                if (what, kind) == (ALL, COLD):
                    notes = _compiled(runs[0]), variant.note
                    line = replace(line, note="; ".join(filter(None, notes)))
                lines.append(with_goal(line, at_most=goal))
        lines.append(_memory(f"{task}: {variant.name}, peak memory", found[variant.name], base))
    return lines


def table_of(title: str, variants: Sequence[Variant], found: Found) -> Table:
    """One row per variant: seconds and ratios of all times, memory, what was compiled."""
    heads = [f"{what}, {kind}" for kind in (COLD, WARM) for what in (FIRST, ALL)]
    table = Table("variant", *heads, "peak MB", "graphs", "breaks", title=title)
    base = found[variants[0].name]
    for variant in variants:
        if variant.name not in found:
            continue
        own = found[variant.name]
        cells = [
            _shown(_time("", own[kind], base[kind], key))
            for kind in (COLD, WARM)
            for key in ("first_step", "all_steps")
        ]
        memory = statistics.median(run["peak_bytes"] for run in own[WARM]) / 1e6
        counted = own[COLD][0]
        numbers = f"{memory:.0f}", str(counted["graphs"]), str(counted["breaks"])
        table.add_row(variant.name, *cells, *numbers)
    return table


def _time(
    name: str, runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], key: str
) -> Line:
    timing = Timing(tuple(run[key] for run in runs), tuple(run[key] for run in base[: len(runs)]))
    ends = min(timing.ratios), max(timing.ratios)
    return Line(name, timing.median * 1e3, timing.ratio, *ends)


def _memory(
    name: str, own: Mapping[str, Sequence[Mapping[str, Any]]], base: Mapping[str, Any]
) -> Line:
    """Of processes with a warm cache, where little is compiled: a long training compiles less."""
    kept = Timing(
        *(tuple(run["peak_bytes"] for run in side[WARM]) for side in (own, base)),
    )
    cold = statistics.median(run["peak_bytes"] for run in own[COLD])
    note = f"{kept.median / 1e6:.0f} MB, warm cache; cold {cold / 1e6:.0f} MB"
    ends = min(kept.ratios), max(kept.ratios)
    return Line(name, None, kept.ratio, *ends, note=note)


def _goal(goals: Goals, what: str, kind: str) -> float | None:
    asked = {(ALL, COLD): goals.cold, (ALL, WARM): goals.warm, (FIRST, WARM): goals.warm_start}
    return asked.get((what, kind))


def _compiled(run: Mapping[str, Any]) -> str:
    return (
        f"{run['graphs']} graphs, {run['breaks']} breaks, {run['kernels']} kernels,"
        f" {run['bytes_moved'] / 1e6:.0f} MB moved"
    )


def _shown(line: Line) -> str:
    assert line.milliseconds is not None
    assert line.ratio is not None
    return f"{line.milliseconds / 1e3:.2f} s  {line.ratio:.2f}"
