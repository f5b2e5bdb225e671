"""What the metrics of a ``ModuleMonitor`` ask of tmm."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from tmm.core.metrics import MetricFunction
from tmm.core.records import Site
from tmm.module_monitor.names import Names
from tmm.spec.rules import CoordinateCheckRule, Rule
from tmm.spec.spec import Spec

Aggregation = Callable[[torch.Tensor], object]
Metric = tuple[re.Pattern[str], MetricFunction, Aggregation | None]
"""A pattern of names, a function, and what joins the function's values."""

Metrics = Mapping[str, Metric]


class ModuleMonitorSpec(Spec):
    """The rules of a ``ModuleMonitor``: they may match nothing, and names are the user's.

    Outputs that are tuples, dictionaries and the like have no rows, and a reference is compared as
    it is at each step, as in torch-module-monitor.
    """

    is_strict = False
    copies_reference = False

    def __init__(
        self,
        rules: Iterable[Rule],
        names: Names,
        reference: torch.nn.Module | None,
        reference_dtype: torch.dtype | None,
    ) -> None:
        super().__init__(*rules, reference=reference, reference_dtype=reference_dtype)
        self._names = names

    def site_name(self, family: str, site: Site) -> str | None:
        """The formatted name; None for a tensor inside of an output."""
        if site.path.startswith("["):
            return None
        return self._names.formatted(site.module) + site.path


def rules_of_modules(
    family: str, metrics: Metrics, names: Names, excluded: re.Pattern[str]
) -> list[Rule]:
    """The rules of activations, or of their differences from the reference's."""

    def matches(pattern: re.Pattern[str], name: str) -> bool:
        formatted = names.formatted(name)
        return not excluded.match(formatted) and bool(pattern.match(formatted))

    return [
        Rule(
            *(family, "modules", (), ((name, function),), partial(matches, pattern)),
            aggregate="mean" if aggregation is None else aggregation,
            falls_back=True,
        )
        for name, (pattern, function, aggregation) in metrics.items()
    ]


def rules_of_parameters(family: str, metrics: Metrics, names: Names) -> list[Rule]:
    """The rules of parameters, their gradients, or their differences from the reference's."""

    def matches(pattern: re.Pattern[str], name: str) -> bool:
        return bool(pattern.match(name) or pattern.match(names.raw(name)))

    return [
        Rule(family, "parameters", (), ((name, function),), partial(matches, pattern))
        for name, (pattern, function, _) in metrics.items()
    ]


def rule_of_coordinate_check(names: Names, excluded: re.Pattern[str]) -> Rule:
    """The refined coordinate check of all modules that are not excluded."""

    def matches(name: str) -> bool:
        return not excluded.match(names.formatted(name))

    return CoordinateCheckRule("rcc", "modules", ("l2norm",), pattern=matches, operands=True)
