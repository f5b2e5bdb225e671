"""Lines of a report, and how they are kept and shown."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.timing import Timing, environment

RESULTS = Path(__file__).parent / "results"
FOLDER_VARIABLE = "TMM_BENCHMARK_RESULTS"
"""Names another folder for reports: ``python -m benchmarks`` gathers those of its questions."""


@dataclass(frozen=True)
class Line:
    """What was found of one variant: a ratio, with its 95 % interval.

    The note says to what it is a ratio, where that is not the plain compiled program.
    ``at_most`` and ``at_least`` are goals of the ratio.
    """

    variant: str
    milliseconds: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    at_most: float | None = None
    at_least: float | None = None
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the ratio reaches its goals; None without a ratio or a goal."""
        if self.ratio is None or (self.at_most is None and self.at_least is None):
            return None
        below = self.at_most is None or self.ratio <= self.at_most
        return below and (self.at_least is None or self.ratio >= self.at_least)


def timed(variant: str, timing: Timing, note: str = "") -> Line:
    """The line of a variant from its rounds."""
    low, high = timing.interval
    return Line(variant, timing.median * 1e3, timing.ratio, low, high, note=note)


def with_goal(line: Line, *, at_most: float | None = None, at_least: float | None = None) -> Line:
    """The same line with a goal."""
    return replace(line, at_most=at_most, at_least=at_least)


def save_report(question: str, device: str, report: Mapping[str, object]) -> Path:
    """Write a report to ``results/``, one per question, kind of machine and day."""
    folder = Path(os.environ.get(FOLDER_VARIABLE, RESULTS))
    folder.mkdir(exist_ok=True)
    path = folder / f"{question}-{device}-{date.today()}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    return path


def finish(
    question: str,
    device: str,
    lines: Sequence[Line],
    *,
    save: bool,
    title: str,
    **more: object,
) -> None:
    """Show the lines of a question and, if asked, keep them with ``more``."""
    dicts = [asdict(line) | {"is_met": line.is_met} for line in lines]
    show({question: dicts}, title)
    if save:
        report = {"title": title, "environment": environment(), **more, "lines": dicts}
        save_report(question, device, report)


def show(lines: Mapping[str, Iterable[Mapping[str, Any]]], title: str) -> None:
    """Print one table of the lines of all questions."""
    columns = ("question", "variant", "ms", "ratio", "95 % interval", "goal", "note")
    table = Table(*columns, title=title)
    for question, found in lines.items():
        for index, line in enumerate(found):
            table.add_row("" if index else question, *cells(line))
        table.add_section()
    Console(width=150).print(table)


def cells(line: Mapping[str, Any]) -> tuple[str, ...]:
    """What a table shows of a line: variant, milliseconds, ratio, interval, goal, note."""
    low, high = line.get("low"), line.get("high")
    return (
        str(line["variant"]),
        _number(line.get("milliseconds"), ".2f"),
        _number(line.get("ratio"), ".4f"),
        "" if not low or not high else f"{low:.4f} to {high:.4f}",
        _goal(line),
        str(line.get("note") or ""),
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _goal(line: Mapping[str, Any]) -> str:
    bounds = {"<=": line.get("at_most"), ">=": line.get("at_least")}
    text = " and ".join(
        f"{sign} {bound:.4g}" for sign, bound in bounds.items() if bound is not None
    )
    is_met = line.get("is_met")
    return text if is_met is None else f"{text}: {'met' if is_met else 'MISSED'}"
