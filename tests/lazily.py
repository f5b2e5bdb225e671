"""Modules that take seconds to import, and are not needed to collect the tests."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from typing import Any


class Lazily:
    """A module that is imported when something of it is asked for.

    What is imported stays: as in ``conftest.py``, no collection of garbage is to look at it again.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest asks everything whether it is a test
            raise AttributeError(attribute)
        is_new = self._name not in sys.modules
        module = import_module(self._name)
        if is_new:
            gc.collect()
            gc.freeze()
        return getattr(module, attribute)
