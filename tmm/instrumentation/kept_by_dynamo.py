"""What Dynamo keeps of programs that are gone, and the way to take it back."""

from __future__ import annotations

import linecache
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

from tmm.core.dynamo_private import CheckFunctionManager
from tmm.core.torch_private import graph_sources


class KeptByDynamo:
    """What Dynamo keeps of some programs, until `forget`.

    With a code object it keeps what it compiled, which refers to the code in turn, where no garbage
    collector sees it. And whatever a guard compares by identity carries a finalizer that refers to
    all guards of its program: if that is a class or a function, for as long as the process runs.
    The source of each graph stays, too, for tracebacks.
    """

    def __init__(self) -> None:
        self._forgetters: list[Callable[[], None]] = []
        self._finalizers: list[weakref.finalize[[], Any]] = []
        self._marker: weakref.finalize[[], Any] | None = None
        self._sources: list[str] = []
        self._known_sources = 0

    def add(self, forget: Callable[[], None]) -> None:
        """Know what lets Dynamo forget a program."""
        self._forgetters.append(forget)

    def begin(self) -> None:
        """Dynamo begins to compile one of the programs, or a frame that it calls."""
        self._marker = weakref.finalize(self, _nothing)
        self._known_sources = len(graph_sources())

    def end(self) -> None:
        """Dynamo has compiled it."""
        self._sources += list(graph_sources())[self._known_sources :]
        marker, self._marker = self._marker, None
        # In the order in which they came.
        everything: dict[weakref.finalize[[], Any], object]
        everything = getattr(weakref.finalize, "_registry", {})
        if marker is None or marker not in everything:
            return
        for finalizer in reversed(everything):
            if finalizer is marker:
                break
            if (found := finalizer.peek()) is not None and _is_of_guards(found[1]):
                self._finalizers.append(finalizer)
        marker.detach()

    def forget(self) -> None:
        """Let Dynamo keep nothing of the programs, which must not run afterwards."""
        finalizers, self._finalizers = self._finalizers, []
        forgetters, self._forgetters = self._forgetters, []
        for finalizer in finalizers:
            finalizer()  # as if the object had gone: what was compiled is invalid
        for forget in forgetters:
            forget()
        sources, self._sources = self._sources, []
        for name in sources:
            graph_sources().pop(name, None)
            linecache.cache.pop(name, None)


def _is_of_guards(function: object) -> bool:
    method = function.func if isinstance(function, partial) else function
    return isinstance(getattr(method, "__self__", None), CheckFunctionManager)


def _nothing() -> None:
    return None
