"""What a part of a run on a device has found, and the report of all parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One line of a report: what was looked at, what was found, in words and in numbers.

    ``is_good`` is None where nothing was promised.
    """

    what: str
    text: str
    is_good: bool | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PartReport:
    """The findings of a part, the seconds that it took, and why it ended early, if it did.

    ``is_cut`` tells that it was for want of time, which is no fault.
    """

    name: str
    does: str
    findings: tuple[Finding, ...]
    seconds: float
    ended_by: str = ""
    is_cut: bool = False

    @property
    def is_good(self) -> bool:
        """Whether it did not fail, and nothing that it found is bad."""
        failed = bool(self.ended_by) and not self.is_cut
        return not failed and all(one.is_good is not False for one in self.findings)


def read_findings(path: Path) -> tuple[Finding, ...]:
    """The findings in a file, of which the last line may have been cut off."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(Finding(**json.loads(line)))
        except ValueError:
            break
    return tuple(found)


def append(path: Path, finding: Finding) -> None:
    """Put one more into a file, so that it is there whatever happens next."""
    with path.open("a") as file:
        file.write(json.dumps(asdict(finding)) + "\n")


def write_report(
    folder: Path, title: str, parts: Sequence[PartReport], environment: Mapping[str, str]
) -> Path:
    """Write ``report.md`` and ``report.json`` into a folder; gives the path of the former."""
    path = folder / "report.md"
    path.write_text("\n".join(_lines(title, parts, environment)) + "\n")
    report = {
        "title": title,
        "environment": dict(environment),
        "parts": [asdict(part) | {"is_good": part.is_good} for part in parts],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return path


def _lines(
    title: str, parts: Iterable[PartReport], environment: Mapping[str, str]
) -> Iterable[str]:
    yield f"# {title}"
    yield ""
    yield from (f"- {name}: {value}" for name, value in environment.items())
    for part in parts:
        yield ""
        yield f"## {part.name}: {'good' if part.is_good else 'NOT GOOD'}, {part.seconds:.0f} s"
        yield ""
        yield part.does
        yield ""
        if part.findings:
            yield "| | found | |"
            yield "|---|---|---|"
        marks = {True: "good", False: "**BAD**", None: ""}
        for one in part.findings:
            yield f"| {_cell(one.what)} | {_cell(one.text)} | {marks[one.is_good]} |"
        if part.ended_by:
            yield ""
            yield f"**Ended early**: {_cell(part.ended_by)}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "<br>")
