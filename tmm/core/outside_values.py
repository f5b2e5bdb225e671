"""The numbers that a function reads from outside of it, which a trace of it keeps as they were."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from numbers import Number
from typing import Any, TypeAlias

Values: TypeAlias = dict[str, object]
"""By what it is called in the function."""

_PLAIN = (Number, str, bytes, type(None))
_MOST = 256  # values and objects that are looked at
_LIBRARIES = frozenset(("torch", "numpy", "math", "builtins", "functools", "operator", "tmm"))


def outside_values(function: Callable[..., Any]) -> Values:
    """Numbers, texts and flags that ``function`` may read from anywhere but its arguments.

    Those are in the variables of what encloses it, among the globals that it names, in its
    defaults, in what it is bound to, in the attributes and elements of these, and in whatever
    functions of the user it calls. Nothing of a user is called to find them.
    """
    look = _Look()
    look.into_callable("", function)
    return look.found


def differing(before: Values, now: Values) -> list[str]:
    """The names of values that are others than before."""
    names = [*before, *(name for name in now if name not in before)]
    return [name for name in names if not _is_same(before.get(name), now.get(name))]


def _is_same(before: object, now: object) -> bool:
    if type(before) is not type(now):
        return False
    return before == now or (before != before and now != now)  # a NaN is as it was


class _Look:
    """One look around; what was looked at is not looked at again."""

    def __init__(self) -> None:
        self.found: Values = {}
        self._seen: set[tuple[int, frozenset[str]]] = set()

    def into_callable(self, prefix: str, function: object) -> None:
        """Look at what a callable reads."""
        if isinstance(function, partial):
            self._into(f"{prefix}args", function.args, frozenset())
            self._into(f"{prefix}keywords", function.keywords, frozenset())
            self.into_callable(prefix, function.func)
        elif isinstance(function, types.MethodType):
            if isinstance(function.__func__, types.FunctionType):
                self._into_function(prefix, function.__func__, bound_to=function.__self__)
        elif isinstance(function, types.FunctionType):
            self._into_function(prefix, function)
        elif not isinstance(function, type):
            call = inspect.getattr_static(type(function), "__call__", None)
            if isinstance(call, types.FunctionType) and not _is_of_a_library(function):
                self._into_function(prefix, call, bound_to=function)

    def _into_function(
        self, prefix: str, function: types.FunctionType, bound_to: object = None
    ) -> None:
        names = frozenset(_names(function.__code__))
        for name, value in _variables(function, names):
            self._into(prefix + name, value, names)
        if bound_to is not None:
            self._into(f"{prefix}self", bound_to, names)

    def _into(self, name: str, value: object, names: frozenset[str]) -> None:
        """Look at a value; of an object at those of its attributes that ``names`` has."""
        if isinstance(value, _PLAIN):
            self.found[name] = value
            return
        key = id(value), names
        if key in self._seen or len(self._seen) >= _MOST:
            return
        self._seen.add(key)
        if isinstance(value, dict):
            for index, element in islice(dict.items(value), _MOST):
                self._into(f"{name}[{index!r}]", element, names)
        elif isinstance(value, (list, tuple)):
            for number, element in enumerate(value[:_MOST]):
                self._into(f"{name}[{number}]", element, names)
        elif isinstance(value, (set, frozenset)):
            self.found[name] = frozenset(value)
        elif not _is_of_a_library(value):
            if isinstance(value, (types.FunctionType, types.MethodType, partial)):
                self.into_callable(f"{name}: ", value)
            else:
                self._into_attributes(name, value, names)

    def _into_attributes(self, name: str, value: object, names: frozenset[str]) -> None:
        for attribute in sorted(names):
            found = inspect.getattr_static(value, attribute, None)
            inner = f"{name}.{attribute}"
            if isinstance(found, property):
                found = found.fget
            if isinstance(found, (staticmethod, classmethod)):
                found = found.__func__
            if isinstance(found, types.MemberDescriptorType):  # one of __slots__
                found = found.__get__(value) if hasattr(value, attribute) else None
            if isinstance(found, types.FunctionType) and not isinstance(value, types.ModuleType):
                self._into_function(f"{inner}: ", found, bound_to=value)
            elif found is not None:
                self._into(inner, found, names)


def _names(code: types.CodeType) -> Iterator[str]:
    """The globals and attributes that a function, or one inside of it, names."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _variables(function: types.FunctionType, names: frozenset[str]) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # it is yet to be given a value
    for name in sorted(names & function.__globals__.keys()):
        yield name, function.__globals__[name]
    yield "defaults", function.__defaults__ or ()
    yield "keyword defaults", function.__kwdefaults__ or ()


def _is_of_a_library(value: object) -> bool:
    """Whether a value is of a library whose numbers nobody changes."""
    if isinstance(value, types.ModuleType):
        home: object = value.__name__
    else:
        home = getattr(value, "__module__", None) or type(value).__module__
    return isinstance(home, str) and home.partition(".")[0] in _LIBRARIES
