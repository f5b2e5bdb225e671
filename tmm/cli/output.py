"""How commands print: tables for people, JSON for programs, errors with exit status 1."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from tmm.cli.terminal import clean, say
from tmm.runs.text_values import plain

Root = Annotated[
    Path, typer.Option("--root", help="Folder of all runs, or its URL.", envvar="TMM_ROOT")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Query = Annotated[
    str, typer.Argument(help="Id of a run, the beginning of one, its name, path or URL.")
]

_NUMBER = 12  # the width of a number such as -1.23457e-05
_WORD = 2  # what a text is broken into at least
_GAP = 3  # between two columns


def print_json(value: object) -> None:
    """Print ``value`` as JSON; NaN and infinities, which JSON lacks, as texts."""
    typer.echo(json.dumps(plain(value), indent=2, allow_nan=False))


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], *, whole: int = 1
) -> None:
    """Print a table as wide as the terminal; a note in its place if it has no rows.

    Empty columns are left out, and the first ``whole`` ones are not broken into lines where that
    leaves room for the others.
    """
    from rich.box import SIMPLE_HEAD
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not rows:
        console.print(Text(clean(f"{title}: none")))
        return
    cells = [[clean(shown(cell)) for cell in row] for row in rows]
    used = [index for index in range(len(columns)) if any(row[index] for row in cells)]
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False)
    headers = [clean(column) for column in columns]
    lines = [headers, *cells]
    widths = {index: max(cell_len(line[index]) for line in lines) for index in used}
    unbroken = _unbroken(widths, whole, console.width)
    for index in used:
        header = Text(headers[index])
        table.add_column(header, overflow="fold", no_wrap=index in unbroken)
    for row in cells:
        table.add_row(*(Text(row[index]) for index in used))
    console.print(Text(clean(title), "bold"))
    console.print(table)
    console.print()


def _unbroken(widths: Mapping[int, int], whole: int, room: int) -> set[int]:
    """The columns that are not broken into lines; the others have room for something at least.

    What is too wide beside them is left out by rich, without a word.
    """
    narrow = {index for index, width in widths.items() if width <= _NUMBER}
    for unbroken in (set(range(whole)), narrow - set(range(whole))):
        rest = _NUMBER if whole == 1 else _WORD
        least = (w if i in unbroken else min(w, rest) for i, w in widths.items())
        if sum(least) + _GAP * (len(widths) - 1) <= room:
            return unbroken
    return set()


def shown(value: object) -> str:
    """A cell of a table."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, datetime):
        return _local(value)
    if isinstance(value, (tuple, list)):
        return ", ".join(map(str, value))
    return str(value)


def _local(time: datetime) -> str:
    try:
        time = time.astimezone()
    except (OverflowError, ValueError, OSError):  # one that no clock of this machine shows
        return time.isoformat()
    return f"{time:%Y-%m-%d %H:%M}"


def fail(message: str) -> NoReturn:
    """Say what is wrong and exit with status 1."""
    say(f"tmm: {message}", error=True)
    raise typer.Exit(1)


@contextmanager
def told() -> Iterator[None]:
    """Turn errors that a user can mend into messages, and warnings into lines."""
    with warnings.catch_warnings(record=True) as caught:
        try:
            yield
        except (LookupError, ValueError, OSError) as error:
            is_plain = not isinstance(error, LookupError) or not error.args
            fail(str(error) if is_plain else str(error.args[0]))
        finally:
            for warning in caught:
                say(f"tmm: warning: {warning.message}", error=True)
