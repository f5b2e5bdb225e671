"""Series of numbers by key: what everything that reads them asks of a record."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Protocol

import numpy as np

from tmm.core.metrics import FloatArray
from tmm.core.records import KeyInfo, StepArray


class Recorded(Protocol):
    """Series of numbers by key; ``tmm.open_run(...)`` gives one."""

    @property
    def steps(self) -> StepArray:
        """The recorded steps: sorted, each once."""

    def keys(self, pattern: str | None = None) -> list[str]:
        """The keys that ``pattern`` matches (`re.match`), in the order of execution."""

    def series(self, key: str) -> tuple[StepArray, FloatArray]:
        """The steps at which ``key`` was measured, shape (n,), and its values.

        Raises KeyError for an unknown key.
        """

    def key_info(self, key: str) -> KeyInfo:
        """What is known of ``key``; KeyError for an unknown one."""


class KnownKeys:
    """The keys of a record that holds what is known of each, in the order of execution."""

    _infos: Mapping[str, KeyInfo]

    def keys(self, pattern: str | None = None) -> list[str]:
        """Return the keys that ``pattern`` matches (`re.match`), in the order of execution.

        Raises ValueError for a pattern that is no regular expression.
        """
        if pattern is None:
            return list(self._infos)
        if not isinstance(pattern, str):
            raise TypeError(f"pattern={pattern!r} is not text; give one regular expression")
        try:
            match = re.compile(pattern).match
        except re.error as error:
            raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from error
        return [key for key in self._infos if match(key)]

    def key_info(self, key: str) -> KeyInfo:
        """Return what is known of ``key``; KeyError names the nearest keys."""
        return self._known(key)

    def _known(self, key: str) -> KeyInfo:
        if not isinstance(key, str):
            raise TypeError(f"key={key!r} is not text; give one key")
        if key not in self._infos:
            near = get_close_matches(key, self._infos)
            raise KeyError(f"no key {key!r}" + (f"; nearest: {near}" if near else ""))
        return self._infos[key]


def joined_steps(steps: Iterable[StepArray]) -> StepArray:
    """All of several lists of steps, shape (n,): sorted, each once."""
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *steps]))
