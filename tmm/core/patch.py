"""Attributes of objects that are replaced for a while."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any


class Substitutes:
    """Values that stand in the place of attributes between ``install`` and ``remove``.

    They go past ``__setattr__``, into the instance: what its class has is hidden, not changed.
    """

    def __init__(self) -> None:
        self._values: list[tuple[dict[str, Any], str, object]] = []
        self._installed = ExitStack()

    def add(self, owner: object, name: str, value: object) -> None:
        """Have ``value`` stand for ``owner.name``, from the next ``install`` on."""
        self._values.append((vars(owner), name, value))

    def install(self) -> None:
        """Put the values where they belong; a second call changes nothing."""
        self.remove()
        for attributes, name, value in self._values:
            if name in attributes:
                self._installed.callback(attributes.__setitem__, name, attributes[name])
            else:
                self._installed.callback(attributes.pop, name, None)
            attributes[name] = value

    def remove(self) -> None:
        """Put back what stood there before."""
        self._installed.close()
