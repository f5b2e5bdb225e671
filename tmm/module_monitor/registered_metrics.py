"""The metrics that were added to a ``ModuleMonitor``, and what they ask of tmm."""

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


class RegisteredMetrics:
    """Metrics by name, one dictionary for each family: a pattern, a function, an aggregation."""

    def __init__(self) -> None:
        self.activation_metrics: dict[str, Metric] = {}
        self.activation_difference_metrics: dict[str, Metric] = {}
        self.parameter_metrics: dict[str, Metric] = {}
        self.parameter_difference_metrics: dict[str, Metric] = {}
        self.gradient_metrics: dict[str, Metric] = {}

    def _metrics_changed(self) -> None:
        """A metric was added; for subclasses."""

    def add_activation_metric(
        self,
        metric_name: str,
        metric_fn: MetricFunction,
        metric_regex: str = ".*",
        metric_aggregation_fn: Aggregation | None = None,
    ) -> None:
        """Measure the outputs of modules whose formatted name ``metric_regex`` matches.

        ``metric_fn`` gets a detached tensor and returns a number or a tensor. All elements of what
        it returns in a step, of all micro-batches, are joined by ``metric_aggregation_fn``, the
        mean by default; it returns a number, or numbers by suffix of the key.

        Raises:
            ValueError: if there is a metric of that name, or for an invalid pattern.
            TypeError: if a function cannot be called.
        """
        known = self.activation_metrics
        self._add(known, metric_name, metric_fn, metric_regex, metric_aggregation_fn)

    def add_activation_difference_metric(
        self,
        metric_name: str,
        metric_fn: MetricFunction,
        metric_regex: str = ".*",
        metric_aggregation_fn: Aggregation | None = None,
    ) -> None:
        """Compare the outputs of modules with the reference's: ``metric_fn`` gets both.

        Otherwise as ``add_activation_metric``.
        """
        known = self.activation_difference_metrics
        self._add(known, metric_name, metric_fn, metric_regex, metric_aggregation_fn)

    def add_parameter_metric(
        self, metric_name: str, metric_fn: MetricFunction, metric_regex: str = ".*"
    ) -> None:
        """Measure parameters whose name ``metric_regex`` matches, in ``monitor_parameters``.

        ``metric_fn`` gets a detached tensor and returns a number. Errors as of
        ``add_activation_metric``.
        """
        self._add(self.parameter_metrics, metric_name, metric_fn, metric_regex)

    def add_parameter_difference_metric(
        self, metric_name: str, metric_fn: MetricFunction, metric_regex: str = ".*"
    ) -> None:
        """Compare parameters with the reference's, in ``monitor_parameters``."""
        self._add(self.parameter_difference_metrics, metric_name, metric_fn, metric_regex)

    def add_gradient_metric(
        self, metric_name: str, metric_fn: MetricFunction, metric_regex: str = ".*"
    ) -> None:
        """Measure gradients of parameters, in ``monitor_gradients``."""
        self._add(self.gradient_metrics, metric_name, metric_fn, metric_regex)

    def _add(
        self,
        known: dict[str, Metric],
        name: str,
        function: MetricFunction,
        regex: str,
        aggregation: Aggregation | None = None,
    ) -> None:
        if name in known:
            raise ValueError(f"metric_name={name!r}: a metric of that name already exists")
        if not callable(function):
            raise TypeError(f"metric_fn={function!r} of {name!r} is not a function")
        if aggregation is not None and not callable(aggregation):
            raise TypeError(f"metric_aggregation_fn={aggregation!r} of {name!r} is not a function")
        known[name] = compiled("metric_regex", regex), function, aggregation
        self._metrics_changed()

    def _rules_of_metrics(
        self, names: Names, excluded: re.Pattern[str], *, compares: bool
    ) -> list[Rule]:
        """What the metrics ask of tmm; without ``compares``, nothing of a reference."""
        rules = rules_of_modules("activation", self.activation_metrics, names, excluded)
        rules += rules_of_parameters("parameter", self.parameter_metrics, names)
        rules += rules_of_parameters("gradient", self.gradient_metrics, names)
        if compares:
            differences = self.activation_difference_metrics
            rules += rules_of_modules("activation_difference", differences, names, excluded)
            moved = self.parameter_difference_metrics
            rules += rules_of_parameters("parameter_difference", moved, names)
        return rules


def compiled(argument: str, regex: str) -> re.Pattern[str]:
    """A regular expression; raises ``ValueError``, which names the argument."""
    try:
        return re.compile(regex)
    except re.error as error:
        raise ValueError(f"{argument}={regex!r} is not a regular expression: {error}") from error
