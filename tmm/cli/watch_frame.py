"""How ``tmm watch`` draws a snapshot of a run, in the height and width that there are."""

from __future__ import annotations

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.text import Text

from tmm.analysis.anomaly import SEVERITIES
from tmm.analysis.story import Story
from tmm.cli.sparkline import sparkline
from tmm.cli.terminal import clean
from tmm.core.keys import is_of_system
from tmm.views.live.live_snapshot import Line, Snapshot

_STYLES = {"critical": "bold red", "high": "red", "medium": "yellow", "low": "dim"}
_STATUS_STYLES = {
    **dict.fromkeys(("running", "alive"), "bold green"),
    **dict.fromkeys(("failed", "crashed"), "bold red"),
    "stopped": "bold yellow",
}
_PROCESS = {
    "alive": "process alive",
    "gone": "process gone",
    "unknown": "status unknown",
}
_SPACIOUS = 20  # lines of a terminal from which on there are empty lines and titles
_VALUE_CELLS = 10
_SILENT_SECONDS = 10.0  # and five steps, from which on it is said that nothing comes
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def lines_for_keys(height: int, stories: int) -> int:
    """How many keys have room in a frame of ``height`` lines, with so many stories."""
    return max(1, height - _header(height) - 1 - _story_lines(height, stories))


def draw(snapshot: Snapshot, width: int, height: int) -> Group:
    """``snapshot`` in ``height`` lines at most."""
    spacious = height >= _SPACIOUS
    lines = [_title(snapshot, width), _progress(snapshot)]
    if spacious:
        lines.append(Text())
    key_cells = _key_cells(snapshot, width)
    if spacious and snapshot.lines:
        lines.append(_columns(snapshot, width, key_cells))
    shown = snapshot.lines[: lines_for_keys(height, len(snapshot.findings.stories))]
    lines += [_key(line, width, key_cells) for line in shown]
    if not shown:
        lines.append(Text("no such key yet" if snapshot.keys else "nothing recorded yet", "dim"))
    if spacious:
        lines.append(Text())
    lines += _anomalies(snapshot, _story_lines(height, len(snapshot.findings.stories)))
    if spacious and snapshot.event is not None:
        event = snapshot.event
        lines.append(Text(f"event at step {event.step}: {clean(event.text)}", "yellow"))
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return Group(*lines[:height])


def _header(height: int) -> int:
    # Title and progress; an empty line, the columns, an empty line, and the event.
    return 6 if height >= _SPACIOUS else 2


def _story_lines(height: int, stories: int) -> int:
    return min(stories, max(2, height // 5))


def _title(snapshot: Snapshot, width: int) -> Text:
    stands = snapshot.standing
    status = Text(_PROCESS.get(stands.status, stands.status), _STATUS_STYLES.get(stands.status, ""))
    if stands.seconds is not None:
        status.append(f" {'after' if stands.is_over else 'for'} {duration(stands.seconds)}", "none")
    title = Text(
        _shortened(clean(snapshot.name), max(8, width - cell_len(status.plain) - 2)), "bold"
    )
    room = width - cell_len(title.plain) - cell_len(status.plain)
    if snapshot.id != snapshot.name and room >= len(snapshot.id) + 4:
        title.append(f"  {clean(snapshot.id)}", "dim")
    title.append(" " * max(2, width - cell_len(title.plain) - cell_len(status.plain)))
    return title.append_text(status)


def _progress(snapshot: Snapshot) -> Text:
    if snapshot.last_step is None:
        line = Text("no step yet")
    else:
        line = Text(f"step {snapshot.last_step:,}", "bold")
        if snapshot.steps != snapshot.last_step + 1:
            line.append(f"  {snapshot.steps:,} recorded", "none")
    for unit, rate in snapshot.rates.items():
        line.append(f"  {_rate(rate)} {unit}/s", "none")
    if snapshot.standing.reason:
        line.append(f"  {clean(snapshot.standing.reason)}", "yellow")
    silent, rate = snapshot.silent_seconds, snapshot.rates.get("steps", 0.0)
    patience = max(_SILENT_SECONDS, 5 / rate if rate else 0.0)
    if not snapshot.standing.is_over and silent is not None and silent > patience:
        line.append(f"  nothing new for {duration(silent)}", "bold yellow")
    return line


def _key_cells(snapshot: Snapshot, width: int) -> int:
    names = (cell_len(clean(line.key)) for line in snapshot.lines)
    return min(max(len(_count(snapshot)), *names, 0), max(16, width * 45 // 100))


def _count(snapshot: Snapshot) -> str:
    shown = len(snapshot.lines)
    return "key" if shown == snapshot.keys else f"{shown} of {snapshot.keys:,} keys"


def _columns(snapshot: Snapshot, width: int, key_cells: int) -> Text:
    names = set_cell_size(_count(snapshot), key_cells)
    titles = f"{names}  {'newest':>{_VALUE_CELLS}}"
    if _has_range(width):
        titles += f"  {'least':>{_VALUE_CELLS}}  {'most':>{_VALUE_CELLS}}"
    return Text(f"{titles}  first to last", "dim")


def _has_range(width: int) -> bool:
    return width >= 100


def _key(line: Line, width: int, key_cells: int) -> Text:
    name = set_cell_size(_shortened(clean(line.key), key_cells), key_cells)
    text = Text(name, _STYLES.get(line.severity or "", ""))
    values = line.series.values
    if line.series.is_histogram:
        values = values[-1] if len(values) else np.empty(0)
        cells = [("bins", "dim"), ("", ""), ("", "")]
    else:
        finite = values[np.isfinite(values)]
        least_and_most = (finite.min(), finite.max()) if len(finite) else ()
        cells = [(_value(line.key, value), _style_of(value)) for value in values[-1:]] or [("", "")]
        cells += [(_value(line.key, value), "dim") for value in least_and_most] or [("", "")] * 2
    for cell, style in cells if _has_range(width) else cells[:1]:
        text.append(f"  {cell:>{_VALUE_CELLS}}", style)
    curve = Text(sparkline(values, max(1, width - cell_len(text.plain) - 2)), "cyan")
    curve.highlight_regex("!+", "bold red")
    return text.append("  ").append_text(curve)


def _style_of(value: float) -> str:
    return "" if np.isfinite(value) else "bold red"


def _value(key: str, value: float) -> str:
    if is_of_system(key) and key.endswith("memory"):
        return _bytes(value)
    return f"{value:.5g}"


def _anomalies(snapshot: Snapshot, lines: int) -> list[Text]:
    findings = snapshot.findings
    counts = [
        (severity, sum(anomaly.severity == severity for anomaly in findings.anomalies))
        for severity in reversed(SEVERITIES)
    ]
    if findings.extent is None:
        return [Text("anomalies: looking", "dim")]
    title = Text("anomalies: ", "bold")
    title.append(", ".join(f"{n} {severity}" for severity, n in counts if n) or "none", "none")
    if findings.last_step not in (None, snapshot.last_step):
        title.append(f"  up to step {findings.last_step:,}", "dim")
    for failure in findings.failures:
        title.append(f"  detector {clean(failure)}", "yellow")
    return [title, *map(_story, findings.stories[:lines])]


def _story(story: Story) -> Text:
    line = Text(f"{story.severity:8}", _STYLES[story.severity])
    more = f"(and {len(story.consequences)} more) " if story.consequences else ""
    return line.append(f"  {story.step:>6,}  {more}{clean(story.cause.text)}", "none")


def _shortened(text: str, cells: int) -> str:
    """``text`` in at most so many cells, with its beginning and, above all, its end."""
    if cell_len(text) <= cells:
        return text
    head = max(0, (cells - 1) // 3)
    tail = max(0, cells - 1 - head)
    ending = text
    while cell_len(ending) > tail:
        ending = ending[1:]
    return f"{set_cell_size(text, head)}…{ending}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, ``1:02:03``; with days where there are some."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days}d ' if days else ''}{hour}:{minute:02}:{second:02}"


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"


def _bytes(count: float) -> str:
    for unit in _UNITS:
        if not abs(count) >= 1000 or unit == _UNITS[-1]:
            return f"{count:.3g} {unit}"
        count /= 1024
    raise AssertionError("the last unit returns")
