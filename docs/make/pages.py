"""Writes the pages that follow from the code: ``python -m docs.make.pages`` from the root.

A test says which of them is out of date.
"""

from __future__ import annotations

from pathlib import Path

from docs.make import command_line, keys_page, messages_page, notebook_page

DOCS = Path(__file__).parent.parent
NOTEBOOK = DOCS / "tutorial" / "find-a-fault.ipynb"


def pages() -> dict[Path, str]:
    """The text of each page, by its path."""
    return {
        DOCS / "reference" / "command-line.md": command_line.page(),
        DOCS / "reference" / "keys.md": keys_page.page(),
        DOCS / "reference" / "messages.md": messages_page.page(),
        DOCS / "tutorial" / "find-a-fault.md": notebook_page.page(NOTEBOOK, "../pictures"),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
    notebook_page.write_pictures(NOTEBOOK, DOCS / "pictures")
