"""Values as the text of files that others read: CSV, which a spreadsheet may open, and JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any

_OBEYED = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a cell begins with that a spreadsheet computes or runs."""

_QUOTED = re.compile(r'[,"\r\n]|^\s|\s$')


def spreadsheet_text(text: str) -> str:
    """``text`` with an apostrophe before it where a spreadsheet would take it for a formula.

    Also where it begins with one, so that the text is what follows the first of them.
    """
    return f"'{text}" if text.startswith((*_OBEYED, "'")) else text


def csv_cell(text: str) -> str:
    """``spreadsheet_text`` as a cell of CSV, in quotes where it needs them."""
    cell = spreadsheet_text(text)
    return '"' + cell.replace('"', '""') + '"' if _QUOTED.search(cell) else cell


def plain(value: Any) -> Any:
    """``value`` in the types of JSON; NaN and infinities, which JSON lacks, as texts."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    return value.isoformat() if isinstance(value, datetime) else str(value)
