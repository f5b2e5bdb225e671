"""What Dynamo is given in the place of what it would keep alive."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any


class Handle:
    """Calls something, until it is let go of.

    Dynamo keeps what it was given, and copies of its ``__dict__``, for as long as the process runs.
    A handle has none, and does not keep what it calls alive, so that models and compiled programs
    need not live as long.
    """

    __slots__ = ("__weakref__", "_called")

    def __init__(self, called: Callable[..., Any]) -> None:
        kind = weakref.WeakMethod if inspect.ismethod(called) else weakref.ref
        self._called: Callable[[], Callable[..., Any] | None] = kind(called)

    def __call__(self, *arguments: Any) -> Any:
        """Call what is there yet."""
        called = self._called()
        assert called is not None, "it was let go of"
        return called(*arguments)

    def let_go(self) -> None:
        """Call nothing from now on."""
        self._called = _nothing


def _nothing() -> None:
    return None
