"""Attributes of objects that hold something else for a while."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any


class _Absent:
    """Stands for an attribute that is not there; copies of it are the same."""


class Replacement:
    """What stands in an attribute of an object, module or class meanwhile, and what stood before.

    It stands in the owner itself, past its ``__setattr__``: what the class of an object has, or a
    base of a class, is hidden, not changed. So ``restore`` deletes what the owner did not have, and
    copies of the owner carry the attribute in the meantime. In a ``with`` block it is restored at
    the end.

    Without a ``value`` the attribute is left as it is until ``put``.
    """

    def __init__(self, owner: object, name: str, value: object = _Absent) -> None:
        self._owner = owner
        self._name = name
        self._own = self._put = self.current()
        if value is not _Absent:
            self.put(value)

    def current(self, default: object = _Absent) -> Any:
        """What the owner itself has now, or ``default``."""
        return vars(self._owner).get(self._name, default)

    @property
    def stands(self) -> bool:
        """Whether what was put is still there, and nobody has taken the place since."""
        return self.current() is self._put

    def put(self, value: object) -> None:
        """Let ``value`` stand there from now on, in place of what was put before."""
        self._put = value
        self._set(value)

    def restore(self) -> None:
        """Give back what stood there at first, whatever stands there now."""
        self.put(self._own)

    def restore_if_it_stands(self) -> bool:
        """The same, unless somebody has taken the place since; tells whether nobody has."""
        stands = self.stands
        if stands:
            self.restore()
        return stands

    def _set(self, value: object) -> None:
        is_class = isinstance(self._owner, type)
        if value is not _Absent:
            if is_class:
                setattr(self._owner, self._name, value)
            else:
                vars(self._owner)[self._name] = value
        elif self._name in vars(self._owner):
            if is_class:
                delattr(self._owner, self._name)
            else:
                del vars(self._owner)[self._name]

    def __enter__(self) -> Replacement:
        return self

    def __exit__(self, *error: object) -> None:
        self.restore()


class Substitutes:
    """Values that stand in attributes of objects between ``install`` and ``remove``."""

    def __init__(self) -> None:
        self._values: list[tuple[object, str, object]] = []
        self._installed = ExitStack()

    def add(self, owner: object, name: str, value: object) -> None:
        """Have ``value`` stand for ``owner.name``, from the next ``install`` on."""
        self._values.append((owner, name, value))

    def install(self) -> None:
        """Put the values where they belong; a second call changes nothing."""
        self.remove()
        for owner, name, value in self._values:
            self._installed.enter_context(Replacement(owner, name, value))

    def remove(self) -> None:
        """Put back what stood there before."""
        self._installed.close()
