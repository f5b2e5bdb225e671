"""What several sinks share."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tmm.core.metrics import HISTOGRAM_EDGES, FloatArray
from tmm.runs.delivery import Value

FINITE_EDGES: FloatArray = HISTOGRAM_EDGES.copy()
"""The edges of histograms for backends that draw no infinite bins: the outer ones end at ±2¹⁷."""
FINITE_EDGES[[0, -1]] = 2 * HISTOGRAM_EDGES[[1, -2]]
FINITE_EDGES.setflags(write=False)


def check_keys(pattern: str | None) -> None:
    """Raise ``ValueError`` for what is no regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"keys={pattern!r} is no regular expression: {error}") from error


def chosen(values: Mapping[str, Value], pattern: str | None) -> dict[str, Value]:
    """The values whose keys ``pattern`` matches (``re.match``); all of them without one."""
    if pattern is None:
        return dict(values)
    return {key: value for key, value in values.items() if re.match(pattern, key)}


def numbers(values: Mapping[str, Value], pattern: str | None) -> dict[str, float]:
    """The same without histograms."""
    found = chosen(values, pattern).items()
    return {key: value for key, value in found if not isinstance(value, np.ndarray)}


def require(module: str, extra: str) -> Any:
    """A module of an optional package; raises ``ImportError``, which names the extra it is in."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{error}; pip install 'tmm-compile[{extra}]'") from error
