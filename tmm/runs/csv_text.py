"""Texts in a CSV file that a spreadsheet may open."""

from __future__ import annotations

_OBEYED = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a cell begins with that a spreadsheet computes or runs."""


def spreadsheet_text(text: str) -> str:
    """``text`` with an apostrophe before it where a spreadsheet would take it for a formula.

    Also where it begins with one, so that the text is what follows the first of them.
    """
    return f"'{text}" if text.startswith((*_OBEYED, "'")) else text
