"""Texts of others, such as the names of runs, as a terminal may show them.

Everything that a command prints for people goes through here: a terminal obeys what such a text
says to it, and a reader believes it.
"""

from __future__ import annotations

import typer

_MOST_CHARACTERS = 2000


def clean(text: object, most: int = _MOST_CHARACTERS) -> str:
    """``text`` on one line, without what a terminal would obey or hide.

    Every such character becomes a replacement: controls, among them the ends of lines and what
    begins a sequence (U+009B, too), what turns the direction of writing, lone surrogates. Spaces of
    all kinds become one. Of a text that is longer than ``most`` there is the beginning.
    """
    whole = str(text)
    spaced = "".join(" " if character.isspace() else character for character in whole[:most])
    shown = "".join(character if character.isprintable() else "\ufffd" for character in spaced)
    return shown if len(whole) <= most else f"{shown}\u2026"


def clean_lines(text: str) -> str:
    """``text`` with its lines, each of them as of `clean` and of any length."""
    return "\n".join(clean(line, len(line)) for line in text.split("\n"))


def say(message: str, *, error: bool = False) -> None:
    """Print one line, to standard error where it is about an error."""
    typer.echo(clean(message), err=error)


def agreed(question: str, *, error: bool = False) -> None:
    """Ask, and end the command where the answer is no."""
    typer.confirm(clean(question), abort=True, err=error)
