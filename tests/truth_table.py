"""One table at the end of a run: what was compared, under which way of compiling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields

PROPERTY = "truth_table_line"
"""The name under which a test hands its line to the terminal summary."""


@dataclass(frozen=True)
class Line:
    """One architecture under one way; ``graphs`` are those of the plain program and the twin."""

    architecture: str
    way: str
    rows: int = 0
    graphs: str = ""
    eager_modules: str = ""
    result: str = ""

    def handed_over(self) -> tuple[str, ...]:
        """As plain text, which travels between processes too."""
        return tuple(str(value) for value in astuple(self))


def table(lines: Iterable[Sequence[str]]) -> list[str]:
    """Aligned columns below their titles; equal lines are kept."""
    titles = [field.name.replace("_", " ") for field in fields(Line)]
    titles[titles.index("graphs")] = "graphs plain/twin"
    rows = [titles, *sorted(map(list, lines))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
