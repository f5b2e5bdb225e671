"""What to measure of what: the rules of a spec."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from tmm.core.families import (
    ACTIVATION,
    ACTIVATION_DIFFERENCE,
    ACTIVATION_GRADIENT,
    ATTENTION,
    GRADIENT,
    OPTIMIZER_STATE,
    PARAMETER,
    PARAMETER_DIFFERENCE,
    RCC,
    UPDATE,
    Family,
    Subject,
)
from tmm.core.keys import SEPARATOR
from tmm.core.metrics import AGGREGATE_NAMES, Aggregate, MetricFunction

Pattern: TypeAlias = str | Callable[[str], bool]
"""A regular expression (``re.match``) or a predicate, of names."""


@dataclass(frozen=True)
class Rule:
    """Metrics of one family, of what a pattern matches; made by ``tmm.activation`` and siblings.

    ``subject`` says whether the pattern is matched on the names of modules or of parameters.
    Functions are traced into the graph with ``trace``; with ``falls_back``, those that cannot be
    run eagerly.
    """

    family: str
    subject: Subject
    metrics: tuple[str, ...]
    functions: tuple[tuple[str, MetricFunction], ...] = ()
    pattern: Pattern | None = None
    aggregate: Aggregate = "mean"
    trace: bool = True
    falls_back: bool = False

    def __str__(self) -> str:
        arguments = [repr(name) for name in self.metrics if self.family != RCC.name]
        arguments += [f"{name}=<function>" for name, _ in self.functions]
        if self.pattern is not None:
            shown = repr(self.pattern) if isinstance(self.pattern, str) else "<predicate>"
            arguments.append(f"{self.subject}={shown}")
        return f"tmm.{self.family}({', '.join(arguments)})"

    def matches(self, name: str) -> bool:
        """Whether the rule applies to the module or parameter of that name (``re.match``)."""
        if callable(self.pattern):
            return bool(self.pattern(name))
        return self.pattern is None or re.match(self.pattern, name) is not None


def activation(
    *metrics: str,
    modules: Pattern | None = None,
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
            is ``"[root module]"``), or a function of the name that tells. All modules without it.
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
    rule = _rule(ACTIVATION, metrics, functions, modules, aggregate)
    if not trace and not functions:
        raise ValueError(f"{rule}: trace=False belongs to your own functions")
    return rule if trace else Rule(**{**vars(rule), "trace": False})


def activation_gradient(
    *metrics: str,
    modules: Pattern | None = None,
    aggregate: Aggregate | None = None,
    **functions: MetricFunction,
) -> Rule:
    """Measure the gradient of the loss with respect to the outputs of modules.

    It is measured in the backward passes of the step's forward passes, while the step is open;
    several losses and micro-batches are joined. Outputs that need no gradient have no rows.
    Arguments and errors as in ``tmm.activation``; a function is traced into the backward graph,
    and its ``aggregate`` cannot be a callable.
    """
    rule = _rule(ACTIVATION_GRADIENT, metrics, functions, modules, aggregate)
    if callable(rule.aggregate):
        raise ValueError(
            f"{rule}: aggregate= cannot be a function here, because the values stay in the backward"
            f" graph; choose one of {', '.join(AGGREGATE_NAMES)}"
        )
    return rule


def parameter(
    *metrics: str,
    parameters: Pattern | None = None,
    aggregate: Aggregate | None = None,
    **functions: MetricFunction,
) -> Rule:
    """Measure parameters, as they are when the step ends.

    ``parameters`` is a regular expression, matched with ``re.match`` on the dotted names of
    parameters, or a function of the name that tells. The other arguments and the errors are those
    of ``tmm.activation``; functions run eagerly. ``monitor.watch(optimizer)`` or
    ``monitor.monitor_parameters()`` measures.
    """
    return _rule(PARAMETER, metrics, functions, parameters, aggregate)


def gradient(
    *metrics: str,
    parameters: Pattern | None = None,
    aggregate: Aggregate | None = None,
    **functions: MetricFunction,
) -> Rule:
    """Measure the gradients of parameters, as the optimizer sees them.

    Arguments and errors as in ``tmm.parameter``. The norm of all gradients together and of those
    of each block are recorded as ``step/gradient_norm`` and ``step/gradient_norm/{block}``.
    """
    return _rule(GRADIENT, metrics, functions, parameters, aggregate)


def update(
    *metrics: str,
    parameters: Pattern | None = None,
    aggregate: Aggregate | None = None,
    **functions: MetricFunction,
) -> Rule:
    """Measure what an optimizer's step adds to the parameters: after minus before.

    ``"relative_norm"`` is the norm of that difference over the norm of the parameter before,
    ``"alignment"`` the cosine of the angle between the two: -1 where a step only shrinks it. A
    copy of the measured parameters is kept during the step. Arguments and errors as in
    ``tmm.parameter``; ``monitor.watch(optimizer)`` measures.
    """
    return _rule(UPDATE, metrics, functions, parameters, aggregate)


def parameter_difference(
    *metrics: str,
    parameters: Pattern | None = None,
    aggregate: Aggregate | None = None,
    **functions: MetricFunction,
) -> Rule:
    """Measure how far parameters have moved from those of the spec's ``reference``.

    Metrics as in ``tmm.activation_difference``. Measured together with ``tmm.parameter``;
    arguments and errors as there.
    """
    return _rule(PARAMETER_DIFFERENCE, metrics, functions, parameters, aggregate)


def activation_difference(
    *metrics: str,
    modules: Pattern | None = None,
    aggregate: Aggregate | None = None,
    **functions: MetricFunction,
) -> Rule:
    """Measure how far the outputs of modules are from those of the spec's ``reference``.

    The reference gets the same batch, shares the masks of dropouts and draws no random numbers. The
    built-in metrics are of the difference, activation minus reference; further ones are
    ``"relative_norm"`` (its norm over that of the reference), ``"cosine"`` (of the angle between
    the two) and ``"l2"`` (the mean, over all rows, of the 2-norm of the last dimension). A function
    gets the activation and the reference. Arguments and errors as in ``tmm.activation``.
    """
    return _rule(ACTIVATION_DIFFERENCE, metrics, functions, modules, aggregate)


@dataclass(frozen=True)
class AttentionRule(Rule):
    """A rule for attention: whether heads are ``pooled``, and how many ``queries`` are measured."""

    pooled: bool = False
    queries: int | None = None

    def __str__(self) -> str:
        more = [", heads='pooled'"] if self.pooled else []
        more += [f", queries={self.queries}"] if self.queries is not None else []
        return f"{super().__str__()[:-1]}{''.join(more)})"


def attention(
    *metrics: str,
    modules: Pattern | None = None,
    heads: Literal["apart", "pooled"] = "apart",
    queries: int | None = None,
    aggregate: Aggregate | None = None,
    **functions: MetricFunction,
) -> Rule:
    """Measure every scaled-dot-product attention that a module calls, per head.

    Of the distributions over the keys, before dropout, are recorded as
    ``attention_{name}/{module}.head_{i}``: ``"entropy"`` (mean over the queries, in nats),
    ``"normalized_entropy"`` (divided by the logarithm of the number of keys that a query may see; 0
    for one key), ``"logsumexp"`` (mean; of the logits), ``"max_probability"`` (mean of the
    largest), ``"sink_mass"`` (mean of the probability of key 0) and ``"max_logit"`` (the largest
    of all, with what a float mask adds). Queries that may see no key are left out. A key is
    forbidden by a boolean mask or by a float mask of -9999 and below.

    The metrics of ``tmm.activation``, without histograms, and functions are of query, key, value
    and output: ``activation/{module}.head_{i}.query/{metric}``, ``.key``, ``.value`` and
    ``.activation``. With grouped queries, keys and values have fewer heads.

    Args:
        *metrics: names of metrics of either kind.
        modules: as in ``tmm.activation``; matched on the module whose forward calls the attention.
        heads: ``"pooled"`` joins the heads, and leaves ``.head_{i}`` out of the keys.
        queries: the statistics of distributions are of at most so many queries, evenly spaced.
        aggregate: as in ``tmm.activation``; not a callable.
        **functions: get query, key, value or output of one head, of all items of the batch.

    Raises:
        ValueError: for an unknown metric, an invalid pattern, aggregate, ``heads`` or ``queries``.
        TypeError: for a metric that is not a name or a function that cannot be called.
    """
    rule = _rule(ATTENTION, metrics, functions, modules, aggregate)
    if callable(rule.aggregate):
        raise ValueError(
            f"{rule}: aggregate= cannot be a function here; choose one of"
            f" {', '.join(AGGREGATE_NAMES)}"
        )
    if heads not in ("apart", "pooled"):
        raise ValueError(f"{rule}: heads={heads!r} is neither 'apart' nor 'pooled'")
    if queries is not None and (
        isinstance(queries, bool) or not isinstance(queries, int) or queries < 1
    ):
        raise ValueError(f"{rule}: queries={queries!r} is not a number of queries, at least 1")
    return AttentionRule(**vars(rule), pooled=heads == "pooled", queries=queries)


@dataclass(frozen=True)
class CoordinateCheckRule(Rule):
    """A rule for the refined coordinate check: whether its ``operands`` are recorded, too."""

    operands: bool = False


def rcc(*, modules: Pattern | None = None, operands: bool = False) -> Rule:
    """The refined coordinate check of modules (Haas, Bordt, von Luxburg, Vankadara 2025).

    With W_t and x_t the weights and inputs of a module and W_0 and x_0 those of the spec's
    ``reference``, it records, as means over all rows of the 2-norm of the last dimension,
    ``RCC (W_t-W_0)x_t/{module}/l2norm`` (what its own weights did to its output),
    ``RCC W_0(x_t-x_0)/{module}/l2norm`` (what its changed input did), ``RCC x_t/...`` and
    ``RCC (x_t-x_0)/...``. Linear and normalization layers have rows of both terms without the bias,
    ``{module}.weight``; embeddings have the first term only; the root has none.

    Args:
        modules: as in ``tmm.activation``.
        operands: record ``RCC (W_t-W_0)x_t/{module}.weight/W_t x_t/l2norm`` and
            ``RCC W_0(x_t-x_0)/{module}.weight/W_0 x_0/l2norm``, too, and of layer normalizations
            ``.weight/x_t`` and ``.weight/x_t-x_0``, their inputs after normalization.

    Raises:
        ValueError: for an invalid pattern.
    """
    rule = CoordinateCheckRule(
        RCC.name, "modules", RCC.metrics, pattern=modules, operands=bool(operands)
    )
    if modules is not None:
        check_pattern(rule, "modules", modules)
    return rule


def optimizer_state(*metrics: str, parameters: Pattern | None = None) -> Rule:
    """Measure the state of Adam-like optimizers, after their step.

    ``"exp_avg_norm"`` and ``"exp_avg_sq_norm"`` are the norms of the two averages, and
    ``"effective_lr"`` is the mean over the elements of a parameter of what the first average is
    multiplied with: lr / bias_correction1 / (sqrt(exp_avg_sq / bias_correction2) + eps) (Kingma and
    Ba 2015, algorithm 1). Errors as in ``tmm.parameter``.
    """
    return _rule(OPTIMIZER_STATE, metrics, {}, parameters, None)


def _rule(
    family: Family,
    metrics: tuple[str, ...],
    functions: Mapping[str, MetricFunction],
    pattern: Pattern | None,
    aggregate: Aggregate | None,
) -> Rule:
    known, subject = family.metrics, family.subject
    assert subject is not None
    own = tuple(functions.items())
    rule = Rule(family.name, subject, metrics, own, pattern, aggregate or "mean")
    if not metrics and not functions:
        raise ValueError(
            f"{rule} measures nothing: name a metric, such as tmm.{family.name}({known[0]!r})"
        )
    for name in metrics:
        if isinstance(name, (list, tuple, set)):
            raise TypeError(
                f"{rule}: {name!r} is not a metric's name; give the names one by one, such as"
                f" tmm.{family.name}({known[0]!r}, {known[1]!r})"
            )
        if not isinstance(name, str):
            raise TypeError(
                f"{rule}: {name!r} is not a metric's name; give your own function as a keyword,"
                f" such as tmm.{family.name}(my_metric=function)"
            )
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"{rule}: unknown metric {name!r}.{hint} Built-in metrics: {', '.join(known)}"
            )
    for name, function in functions.items():
        if not callable(function):
            raise TypeError(
                f"{rule}: {name}={function!r} is not callable. A keyword besides {subject}= and"
                " aggregate= is a metric of your own, a function; built-in metrics are given as"
                f" text, tmm.{family.name}({known[0]!r})"
            )
        if SEPARATOR in name:
            raise ValueError(
                f"{rule}: the metric name {name!r} contains {SEPARATOR!r}, which separates keys"
            )
    names = [*metrics, *functions]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{rule}: the metric {name!r} is given twice")
    if pattern is not None:
        check_pattern(rule, subject, pattern)
    if aggregate is not None:
        _check_aggregate(rule, aggregate)
    return rule


def _check_aggregate(rule: Rule, aggregate: Aggregate) -> None:
    if not rule.functions:
        raise ValueError(
            f"{rule}: aggregate= belongs to your own functions; built-in metrics always describe"
            " the joined data"
        )
    if rule.metrics:
        raise ValueError(
            f"{rule}: aggregate= does not apply to the built-in {rule.metrics[0]!r}; give the"
            " built-in metrics in a rule of their own"
        )
    if not callable(aggregate) and aggregate not in AGGREGATE_NAMES:
        raise ValueError(
            f"{rule}: aggregate={aggregate!r} is neither callable nor one of"
            f" {', '.join(AGGREGATE_NAMES)}"
        )


def check_pattern(owner: object, argument: str, pattern: Pattern) -> None:
    """Raise for a pattern that is neither a regular expression nor a function.

    Raises:
        ValueError: it is text, but no regular expression.
        TypeError: it is something else.
    """
    if callable(pattern):
        _check_predicate(owner, argument, pattern)
        return
    if not isinstance(pattern, str):
        raise TypeError(
            f"{owner}: {argument}={pattern!r} is neither text nor a function; write names as one"
            " regular expression, such as 'encoder|decoder'"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{owner}: {argument}={pattern!r} is not a regular expression: {error}"
        ) from error


def _check_predicate(owner: object, argument: str, predicate: Callable[[str], bool]) -> None:
    """Raise ``TypeError`` for what can be called, but not with a name alone."""
    if isinstance(predicate, type) or hasattr(predicate, "named_modules"):
        kind = predicate if isinstance(predicate, type) else type(predicate)
        raise TypeError(
            f"{owner}: {argument}= is the {'class' if kind is predicate else 'module'}"
            f" {kind.__name__}; give a regular expression of names, or a function of a name"
        )
    if not takes_one(predicate):
        raise TypeError(
            f"{owner}: {argument}={predicate!r} cannot be called with the name alone; write a"
            " function of one argument, such as lambda name: name.endswith('mlp')"
        )


def takes_one(function: Callable[..., object]) -> bool:
    """Whether a function can be called with one argument, as far as its signature says."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True  # some built-in functions do not say
    try:
        signature.bind(None)
    except TypeError:
        return False
    return True
