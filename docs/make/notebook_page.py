"""A notebook as a page: its texts, its code, and what its cells printed and drew."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
_NOTE = """\
!!! note ""
    This page is a notebook, [{name}]({name}). Download it and run it: it takes about a minute on two CPU cores.
    Its pictures need `pip install 'tmm-compile[plot]'`.
"""


def page(notebook: Path, pictures: str) -> str:
    """The Markdown of a notebook, whose pictures lie in the folder ``pictures``, seen from it."""
    parts: list[str] = []
    for number, cell in enumerate(_cells(notebook)):
        source = _text(cell["source"]).strip()
        if cell["cell_type"] == "markdown":
            parts.append(source)
            if number == 0:
                parts.append(_NOTE.format(name=notebook.name))
            continue
        parts.append(f"```python\n{source}\n```")
        parts += _outputs(cell["outputs"], f"{pictures}/{notebook.stem}-{number}.png")
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def write_pictures(notebook: Path, folder: Path) -> None:
    """Write the pictures that the cells of a notebook drew into ``folder``."""
    for number, cell in enumerate(_cells(notebook)):
        for output in cell.get("outputs", ()):
            if (data := output.get("data", {}).get("image/png")) is not None:
                path = folder / f"{notebook.stem}-{number}.png"
                path.write_bytes(base64.b64decode(_text(data)))


def _cells(notebook: Path) -> list[Any]:
    cells: list[Any] = json.loads(notebook.read_text())["cells"]
    return cells


def _outputs(outputs: list[Any], picture: str) -> Iterator[str]:
    printed = ""
    for output in outputs:
        if output["output_type"] == "stream":
            printed += _ESCAPES.sub("", _text(output["text"]))
            continue
        data = output.get("data", {})
        if "image/png" in data:
            yield f"![What the cell above draws]({picture})"
        elif "text/html" in data and "<table" in _text(data["text/html"]):
            yield _one_line(_text(data["text/html"]))
        elif "text/plain" in data:
            printed += _text(data["text/plain"]) + "\n"
    if printed.strip():
        yield f"```text\n{printed.rstrip()}\n```"


def _one_line(html: str) -> str:
    """HTML that Markdown leaves alone, as no line of it is empty."""
    return "\n".join(line for line in html.splitlines() if line.strip())


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)
