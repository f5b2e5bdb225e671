"""What a run says of itself: ``run.json``, written and read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tmm.runtime.store.untrusted import parse_json, read_file

INFO_NAME = "run.json"
EXPLANATION_NAME = "explain.txt"
"""What ``tmm.explain`` says of the model of a run."""

MOST_BYTES = 8 << 20  # parsed, it takes some twenty times as much memory

_TEXTS = ("id", "project", "name", "notes")


def read_info(folder: Path) -> dict[str, Any]:
    """Return what ``run.json`` in ``folder`` holds.

    Raises ValueError, naming the file, where it is damaged, and OSError.
    """
    path = folder / INFO_NAME
    return parse_info(read_file(path, MOST_BYTES), str(path))


def parse_info(text: bytes, path: str) -> dict[str, Any]:
    """Return what a ``run.json`` of this text says; raises ValueError, naming the file."""
    info = _parsed(text, path)
    if (wrong := _wrong(info)) is not None:
        raise ValueError(f"{path} is damaged: {wrong}")
    return info


def is_info(folder: Path) -> bool:
    """Tell whether ``run.json`` in ``folder`` is a run's, maybe a damaged one.

    Other programs may have files of that name. Theirs can be read, and tell of no starts.
    """
    try:
        path = folder / INFO_NAME
        return "starts" in _parsed(read_file(path, MOST_BYTES), str(path))
    except (ValueError, OSError):
        return True


def info_text(info: Mapping[str, Any]) -> str:
    """Return the text of a ``run.json``; raises ValueError for what `read_info` would refuse."""
    if (wrong := _wrong(info)) is not None:
        raise ValueError(f"{INFO_NAME} cannot be written: {wrong}")
    text = json.dumps(info, indent=2) + "\n"
    if len(text) > MOST_BYTES:
        raise ValueError(
            f"{INFO_NAME} would have {len(text):,} bytes, and at most {MOST_BYTES:,} are kept:"
            " is there data in the configuration?"
        )
    parse_json(text.encode())
    return text


def _parsed(text: bytes, path: str) -> dict[str, Any]:
    try:
        info = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path} holds no JSON object")
    return info


def _wrong(info: Mapping[str, Any]) -> str | None:
    """What is not of the kind that it should be."""
    for name in _TEXTS:
        if isinstance(info.get(name), (dict, list)):
            return f"{name!r} is no text"
    if not isinstance(info.get("config") or {}, dict):
        return "'config' is no object"
    tags = info.get("tags") or []
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        return "'tags' is no list of texts"
    starts = info.get("starts") or []
    if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
        return "'starts' is no list of objects"
    return None
