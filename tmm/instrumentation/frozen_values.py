"""Numbers that metric functions read from outside, and that graphs hold as they were."""

from __future__ import annotations

from collections.abc import Iterable

from tmm.core.metrics import MetricFunction
from tmm.core.outside_values import Values, differing, outside_values
from tmm.spec.rules import Rule

_SHOWN = 3


class FrozenValues:
    """Notices that a traced function would give something else by now.

    Whatever changes in a forward pass is the doing of the functions and of the model: a function
    may count its calls. ``is_told`` remembers that the user knows.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        functions = {
            function: name
            for rule in rules
            if rule.subject == "modules" and rule.trace
            for name, function in rule.functions
        }
        self.is_told = False
        self._known: dict[MetricFunction, Values] = {}
        self._names: dict[MetricFunction, str] = {}
        for function, name in functions.items():
            if values := outside_values(function):
                self._known[function], self._names[function] = values, name

    def __bool__(self) -> bool:
        """Whether there is anything that could change."""
        return bool(self._known)

    def note(self) -> None:
        """Take the values as they are for those that the graphs hold."""
        for function in self._known:
            self._known[function] = outside_values(function)

    def changes(self) -> str:
        """What has changed since, in words; empty where nothing has."""
        for function, before in self._known.items():
            now = outside_values(function)
            if names := differing(before, now):
                shown = ", ".join(
                    f"{name} from {before.get(name)!r} to {now.get(name)!r}"
                    for name in names[:_SHOWN]
                )
                return f"the metric {self._names[function]!r} reads what has changed: {shown}"
        return ""
