"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path beside ``target`` to write to, that takes its place if nothing is raised."""
    temporary = target.with_name(f".{target.name[:100]}.{uuid4().hex}.partial")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; raises OSError."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
