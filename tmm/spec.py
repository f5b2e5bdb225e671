"""What to measure: rules, and the specification that holds them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from tmm.metrics import (
    AGGREGATE_NAMES,
    METRIC_NAMES,
    Aggregate,
    MetricFunction,
    Reduction,
    builtin_reductions,
    function_reduction,
)

StepPredicate: TypeAlias = Callable[[int], bool]


@dataclass(frozen=True)
class Rule:
    """Metrics of one family for the modules that a pattern matches; made by ``tmm.activation``."""

    family: str
    metrics: tuple[str, ...]
    functions: tuple[tuple[str, MetricFunction], ...]
    modules: str | None
    aggregate: Aggregate
    trace: bool

    def __str__(self) -> str:
        arguments = [repr(name) for name in self.metrics]
        arguments += [f"{name}=<function>" for name, _ in self.functions]
        if self.modules is not None:
            arguments.append(f"modules={self.modules!r}")
        return f"tmm.{self.family}({', '.join(arguments)})"

    def matches(self, module_name: str) -> bool:
        """Whether the rule applies to the module of that dotted name (``re.match``)."""
        return self.modules is None or re.match(self.modules, module_name) is not None


def activation(
    *metrics: str,
    modules: str | None = None,
    aggregate: Aggregate | None = None,
    trace: bool = True,
    **functions: MetricFunction,
) -> Rule:
    """Measure the outputs of modules.

    Args:
        *metrics: names of built-in metrics, such as ``"rms"``; ``tmm.METRIC_NAMES`` lists them.
            They describe all elements of an output, of all calls and micro-batches of a step
            together.
        modules: regular expression, matched with ``re.match`` on a module's dotted name (the root
            is ``"[root module]"``). All modules without it.
        aggregate: joins the values that the functions return, flattened and concatenated over
            calls and micro-batches: ``"mean"`` (the default), ``"sum"``, ``"min"``, ``"max"`` or a
            callable on the one-dimensional tensor of all values.
        trace: ``False`` runs the functions eagerly on the tensor instead of tracing them into the
            graph.
        **functions: your own metrics: a detached tensor in, a scalar or a tensor out.

    Raises:
        ValueError: for an unknown metric, an invalid pattern or aggregate, or no metric at all.
        TypeError: for a metric that is not a name or a function that cannot be called.
    """
    return _rule("activation", metrics, functions, modules, aggregate, trace)


def _rule(
    family: str,
    metrics: tuple[str, ...],
    functions: Mapping[str, MetricFunction],
    modules: str | None,
    aggregate: Aggregate | None,
    trace: bool,
) -> Rule:
    rule = Rule(family, metrics, tuple(functions.items()), modules, aggregate or "mean", trace)
    if not metrics and not functions:
        raise ValueError(f"{rule} measures nothing: name a metric, such as tmm.{family}('rms')")
    for name in metrics:
        if not isinstance(name, str):
            raise TypeError(
                f"{rule}: {name!r} is not a metric's name; give your own function as a keyword,"
                f" such as tmm.{family}(my_metric=function)"
            )
        if name not in METRIC_NAMES:
            nearest = difflib.get_close_matches(name, METRIC_NAMES, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"{rule}: unknown metric {name!r}.{hint} Built-in metrics:"
                f" {', '.join(METRIC_NAMES)}"
            )
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(f"{rule}: {name}={function!r} is not callable")
        if "/" in name:
            raise ValueError(f"{rule}: the metric name {name!r} contains '/', which separates keys")
    names = [*metrics, *functions]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{rule}: the metric {name!r} is given twice")
    if modules is not None:
        _check_pattern(rule, "modules", modules)
    if aggregate is not None:
        if not functions:
            raise ValueError(
                f"{rule}: aggregate= belongs to your own functions; built-in metrics always"
                " describe the joined data"
            )
        if metrics:
            raise ValueError(
                f"{rule}: aggregate= does not apply to the built-in {metrics[0]!r}; give the"
                " built-in metrics in a rule of their own"
            )
        if not callable(aggregate) and aggregate not in AGGREGATE_NAMES:
            raise ValueError(
                f"{rule}: aggregate={aggregate!r} is neither callable nor one of"
                f" {', '.join(AGGREGATE_NAMES)}"
            )
    if not trace and not functions:
        raise ValueError(f"{rule}: trace=False belongs to your own functions")
    return rule


class Spec:
    """Which metrics to record of which modules, and on which steps.

    Args:
        *rules: made by ``tmm.activation`` and its siblings.
        every: monitor each step that is a multiple of this number, or for which this predicate
            is true.
        exclude: regular expression; modules whose dotted name it matches (``re.match``) are
            measured by no rule.

    Raises:
        ValueError: for a spec without rules, an ``every`` below 1 or an invalid pattern.
        TypeError: for something that is not a rule, a number or a predicate.
    """

    def __init__(
        self, *rules: Rule, every: int | StepPredicate = 1, exclude: str | None = None
    ) -> None:
        if not rules:
            raise ValueError("the spec has no rules; add one, such as tmm.activation('rms')")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"{rule!r} is not a rule; make one with tmm.activation(...)")
        if isinstance(every, bool) or not (isinstance(every, int) or callable(every)):
            raise TypeError(f"every={every!r} is neither a number of steps nor a predicate")
        if isinstance(every, int) and every < 1:
            raise ValueError(f"every={every} must be at least 1; 1 monitors every step")
        if exclude is not None:
            _check_pattern("tmm.Spec", "exclude", exclude)
        self.rules: tuple[Rule, ...] = rules
        self.every: int | StepPredicate = every
        self.exclude: str | None = exclude

    def __str__(self) -> str:
        every = self.every if isinstance(self.every, int) else "<predicate>"
        parts = [*map(str, self.rules), f"every={every}"]
        if self.exclude is not None:
            parts.append(f"exclude={self.exclude!r}")
        return f"tmm.Spec({', '.join(parts)})"

    def is_step_monitored(self, step: int) -> bool:
        """Whether ``step`` is to be monitored."""
        if isinstance(self.every, int):
            return step % self.every == 0
        return bool(self.every(step))

    def excludes(self, module_name: str) -> bool:
        """Whether the module of that name is measured by no rule."""
        return self.exclude is not None and re.match(self.exclude, module_name) is not None

    def matching(self, module_name: str) -> tuple[Rule, ...]:
        """The rules that apply to the module of that name."""
        if self.excludes(module_name):
            return ()
        return tuple(rule for rule in self.rules if rule.matches(module_name))


class Plan:
    """A spec resolved against the modules of one model: the reductions of each.

    Raises ``ValueError`` for a rule that matches no module, and for two different functions of
    one name on one module.
    """

    def __init__(self, spec: Spec, module_names: Sequence[str]) -> None:
        self.spec = spec
        self._reductions: dict[tuple[str, bool], tuple[Reduction, ...]] = {}
        for rule in spec.rules:
            _check_matches(rule, module_names)
        if not any(spec.matching(name) for name in module_names):
            raise ValueError(
                f"{spec} measures nothing: exclude={spec.exclude!r} drops every module that a"
                " rule matches"
            )
        self.module_names = tuple(module_names)
        for name in module_names:
            self.select(name, torch.float32)  # finds collisions now, not in the first step

    def select(self, module_name: str, dtype: torch.dtype) -> tuple[Reduction, ...]:
        """The reductions of an output of that dtype of the module of that name."""
        key = (module_name, dtype.is_complex)
        if key not in self._reductions:
            self._reductions[key] = _reductions(
                module_name, self.spec.matching(module_name), dtype.is_complex
            )
        return self._reductions[key]

    def metrics(self, module_name: str) -> tuple[str, ...]:
        """The names of the metrics of the module of that name."""
        return tuple(
            metric
            for reduction in self.select(module_name, torch.float32)
            for metric in reduction.metrics
        )

    @property
    def matched(self) -> dict[Rule, tuple[str, ...]]:
        """The names of the modules that each rule measures."""
        return {
            rule: tuple(name for name in self.module_names if rule in self.spec.matching(name))
            for rule in self.spec.rules
        }


def _reductions(module_name: str, rules: Iterable[Rule], is_complex: bool) -> tuple[Reduction, ...]:
    builtin: dict[str, Rule] = {}
    functions: dict[str, tuple[Reduction, Rule]] = {}
    for rule in rules:
        for name in rule.metrics:
            builtin.setdefault(name, rule)
        for name, function in rule.functions:
            reduction = function_reduction(name, function, rule.aggregate, rule.trace)
            known = functions.setdefault(name, (reduction, rule))
            if known[0] != reduction:
                raise _collision(module_name, name, known[1], rule)
    for name in builtin.keys() & functions.keys():
        raise _collision(module_name, name, builtin[name], functions[name][1])
    ordered = tuple(name for name in METRIC_NAMES if name in builtin)
    own = tuple(reduction for reduction, _ in functions.values())
    return builtin_reductions(ordered, is_complex=is_complex) + own


def _collision(module_name: str, metric: str, first: Rule, second: Rule) -> ValueError:
    return ValueError(
        f"{first} and {second} both give the metric {metric!r} to module {module_name!r};"
        " rename one of them"
    )


def _check_pattern(owner: object, argument: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{owner}: {argument}={pattern!r} is not a regular expression: {error}"
        ) from error


def _check_matches(rule: Rule, module_names: Sequence[str]) -> None:
    if any(rule.matches(name) for name in module_names):
        return
    assert rule.modules is not None, "a rule without a pattern matches every module"
    literal = re.sub(r"[\\^$.*+?()\[\]{}|]+", ".", rule.modules).strip(".")
    nearest = difflib.get_close_matches(literal, module_names, n=5, cutoff=0.0)
    raise ValueError(
        f"{rule}: modules={rule.modules!r} matches none of the {len(module_names)} modules"
        f" (re.match, from the start of the name); the nearest are {', '.join(map(repr, nearest))}"
    )
