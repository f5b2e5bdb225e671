"""The specification of a monitoring, and what it means for one model."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch

from tmm.core.families import ATTENTION, BRANCH_FAMILIES, FAMILIES, rule_family
from tmm.core.metrics import (
    ATTENTION_METRICS,
    DERIVED_METRICS,
    HISTOGRAM,
    MEANS,
    METRICS,
    Reduction,
    builtin_reductions,
    function_reduction,
)
from tmm.core.records import AttentionRequest, Site
from tmm.spec.alert_settings import AlertSettings
from tmm.spec.rules import AttentionRule, CoordinateCheckRule, Rule, check_pattern, takes_one

if TYPE_CHECKING:
    from tmm.spec.alert_settings import Alarms, OnAlert

StepPredicate: TypeAlias = Callable[[int], bool]
ReferenceSource: TypeAlias = (
    Literal["init"] | torch.nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str]
)


class Spec:
    """Which metrics to record of which modules, and on which steps.

    Args:
        *rules: made by ``tmm.activation`` and its siblings.
        every: monitor each step that is a multiple of this number, or for which this predicate
            is true.
        exclude: regular expression; modules whose dotted name it matches (``re.match``) are
            measured by no rule, nor are their parameters.
        reference: what differences and ``tmm.rcc`` compare with: ``"init"`` for the model as it is
            when it is instrumented, a module, a state dict, or the path of one (by ``torch.save``
            or safetensors; checkpoints may hold it as ``state_dict``, ``model_state_dict`` or
            ``model``), also of a folder of ``torch.distributed.checkpoint``, of which each rank
            reads what it holds. It is copied, frozen parameters too: what changes it later changes
            nothing here.
        reference_device: where the reference is kept. On ``"cpu"`` it lies in pinned memory, and
            is brought over on monitored steps only. By default beside the model.
        reference_dtype: the dtype in which it is kept; it is compared in that of the model.
        reference_samples: compare the first of each batch (dimension 0 of the model's inputs) and
            no more, so that the reference costs that share of a forward pass. Means over tokens
            stay unbiased; metrics that are none are refused, as are models whose batch cannot be
            followed (graph breaks) or that mix its items (batch norm in training mode).
        alerts: let the detectors of ``tmm anomalies`` look at each recorded step when it ends,
            which waits for its numbers: True for what is of medium severity at least, another
            severity ("low", "high", "critical"), or a list of detectors, by name or as functions.
        on_alert: what is done about what they find, each episode once: "warn", "raise" (a
            ``tmm.AlertError``, once the step is recorded), or a function that is called with a
            tuple of ``tmm.analysis.Anomaly``, the cause first.
        diagnosis: measure on monitored steps, too, what tells causes apart: the inputs of the
            model, how far its output differs from item to item, parameters that are not trained,
            and how many steps the state of the optimizers has seen.
        replicas_agree: let ranks compare the parameters that they are to hold alike, bit by bit,
            at the end of each step that is a multiple of this number, monitored or not, as
            ``tmm.replicas_agree`` does. The training waits for that one sum. If some differ, the
            first is named in a warning and in the findings of the run.
        average_gradients: measure the average of the gradients of all ranks, where an optimizer
            averages them in its own step, and nothing is known to do it before. Monitored steps
            then reduce copies of all gradients once more, in the training thread; all ranks step
            together. Without it the rows of such gradients are those of rank 0, under names that
            say so.

    Raises:
        ValueError: for a spec without rules, an ``every`` below 1, an invalid pattern, a rule
            that lacks its reference, or a detector that does not exist.
        TypeError: for something that is not a rule, a number, a predicate, a reference or an
            action.

    Attributes:
        is_strict: whether there must be rules, and each must match something.
        copies_reference: whether the reference is compared as it is when it is given, not as it
            comes to be.
    """

    is_strict = True
    copies_reference = True

    def __init__(
        self,
        *rules: Rule,
        every: int | StepPredicate = 1,
        exclude: str | None = None,
        reference: ReferenceSource | None = None,
        reference_device: torch.device | str | None = None,
        reference_dtype: torch.dtype | None = None,
        reference_samples: int | None = None,
        alerts: Alarms = False,
        on_alert: OnAlert = "warn",
        diagnosis: bool = False,
        replicas_agree: int | None = None,
        average_gradients: bool = False,
    ) -> None:
        if not rules and self.is_strict:
            raise ValueError("the spec has no rules; add one, such as tmm.activation('rms')")
        for rule in rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"{rule!r} is not a rule; make one with tmm.activation(...)")
        if isinstance(every, bool) or not (isinstance(every, int) or callable(every)):
            raise TypeError(f"every={every!r} is neither a number of steps nor a predicate")
        if isinstance(every, int) and every < 1:
            raise ValueError(f"every={every} must be at least 1; 1 monitors every step")
        if not isinstance(every, int) and not takes_one(every):
            raise TypeError(
                f"every={every!r} cannot be called with the step alone; write a function of one"
                " argument, such as lambda step: step < 100"
            )
        if replicas_agree is not None and (
            isinstance(replicas_agree, bool) or not isinstance(replicas_agree, int)
        ):
            raise TypeError(f"replicas_agree={replicas_agree!r} is not a number of steps")
        if replicas_agree is not None and replicas_agree < 1:
            raise ValueError(f"replicas_agree={replicas_agree} must be at least 1")
        if exclude is not None and not isinstance(exclude, str):
            raise TypeError(
                f"exclude={exclude!r} is not text; give one regular expression, such as 'head|norm'"
            )
        if exclude is not None:
            check_pattern("tmm.Spec", "exclude", exclude)
        for rule in rules:
            if FAMILIES[rule.family].needs_reference and reference is None:
                raise ValueError(f"{rule} needs a reference: tmm.Spec(..., reference='init')")
        check_reference(reference)
        if reference_dtype is not None and not isinstance(reference_dtype, torch.dtype):
            raise TypeError(
                f"reference_dtype={reference_dtype!r} is not a dtype; give one, such as"
                " torch.float16"
            )
        if reference_dtype is not None and not reference_dtype.is_floating_point:
            raise ValueError(f"reference_dtype={reference_dtype} is not a floating-point dtype")
        if reference_device is not None:
            try:
                torch.device(reference_device)
            except (RuntimeError, TypeError) as error:
                raise ValueError(f"reference_device={reference_device!r}: {error}") from error
        if reference_samples is not None:
            _check_samples(reference_samples, rules)
        self.rules: tuple[Rule, ...] = rules
        self.reference = reference
        self.reference_device = reference_device
        self.reference_dtype = reference_dtype
        self.reference_samples = reference_samples
        self.every: int | StepPredicate = every
        self.exclude: str | None = exclude
        self.alerts = AlertSettings.build(alerts, on_alert)
        self.diagnosis = bool(diagnosis)
        self.replicas_agree = replicas_agree
        self.average_gradients = bool(average_gradients)

    def __str__(self) -> str:
        every = self.every if isinstance(self.every, int) else "<predicate>"
        parts = [*map(str, self.rules), f"every={every}"]
        if self.exclude is not None:
            parts.append(f"exclude={self.exclude!r}")
        if self.reference is not None:
            named = isinstance(self.reference, (str, os.PathLike))
            parts.append(f"reference={str(self.reference)!r}" if named else "reference=<given>")
        if self.reference_device is not None:
            parts.append(f"reference_device={str(self.reference_device)!r}")
        if self.reference_dtype is not None:
            parts.append(f"reference_dtype={self.reference_dtype}")
        if self.reference_samples is not None:
            parts.append(f"reference_samples={self.reference_samples}")
        if self.alerts is not None:
            parts.append(str(self.alerts))
        if self.diagnosis:
            parts.append("diagnosis=True")
        if self.replicas_agree is not None:
            parts.append(f"replicas_agree={self.replicas_agree}")
        if self.average_gradients:
            parts.append("average_gradients=True")
        return f"tmm.Spec({', '.join(parts)})"

    def is_step_monitored(self, step: int) -> bool:
        """Whether ``step`` is to be monitored."""
        if isinstance(self.every, int):
            return step % self.every == 0
        return bool(self.every(step))

    def excludes(self, module_name: str) -> bool:
        """Whether the module of that name is measured by no rule."""
        return self.exclude is not None and re.match(self.exclude, module_name) is not None

    def site_name(self, family: str, site: Site) -> str | None:
        """The name that a site has in keys of ``family``; None for one that is not recorded.

        Sites of one name are joined. The site's module is named as in patterns.
        """
        return site.module + site.path

    def notes(self, family: str) -> str:
        """What readers of the rows of ``family`` should know, in a few words."""
        if self.reference_samples is not None and rule_family(family) in BRANCH_FAMILIES:
            return f"of the first {self.reference_samples} items of each batch"
        if ATTENTION.begins(family):
            rules = (rule for rule in self.rules if isinstance(rule, AttentionRule))
            limits = sorted({rule.queries for rule in rules if rule.queries is not None})
            if limits:
                return f"of at most {' or '.join(map(str, limits))} evenly spaced queries"
        return ""

    def measures(self, family: str) -> bool:
        """Whether any rule is of that family."""
        return any(rule.family == family for rule in self.rules)


def _check_samples(samples: object, rules: Iterable[Rule]) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise TypeError(f"reference_samples={samples!r} is not a number of items")
    if samples < 1:
        raise ValueError(f"reference_samples={samples} must be at least 1")
    compared = [rule for rule in rules if rule.family in BRANCH_FAMILIES]
    if not compared:
        raise ValueError(
            f"reference_samples={samples} is for tmm.activation_difference and tmm.rcc, which the"
            " spec has none of"
        )
    for rule in compared:
        for metric in rule.metrics:
            if metric not in MEANS:
                raise ValueError(
                    f"{rule}: {metric!r} of some items does not estimate that of a batch"
                    f" (reference_samples={samples}); choose among {', '.join(MEANS)}"
                )
        if rule.functions and rule.aggregate != "mean":
            raise ValueError(
                f"{rule}: aggregate={rule.aggregate!r} over some items does not estimate that over"
                f" a batch (reference_samples={samples}); choose 'mean'"
            )


def check_reference(reference: object) -> None:
    """Raise for what cannot be a reference.

    Raises:
        TypeError: it is no path, module or mapping.
        ValueError: it is a path where no file is.
    """
    if reference is None or isinstance(reference, (torch.nn.Module, Mapping)):
        return
    if not isinstance(reference, (str, os.PathLike)):
        raise TypeError(f"reference={reference!r} is not 'init', a module, a state dict or a path")
    if reference != "init" and not os.path.exists(reference):
        raise ValueError(f"reference={str(reference)!r} is neither 'init' nor a file nor a folder")


class Plan:
    """A spec resolved against one model: the reductions of each of its modules and parameters.

    ``modules`` are the names of the modules, ``parameters`` those of the parameters with the
    module that each belongs to. No rule matches what is ``unnamed``. Raises ``ValueError`` for a
    rule that matches nothing, if the model ``is_whole``, and for two different functions of one
    name in the same place.
    """

    def __init__(
        self,
        spec: Spec,
        modules: Sequence[str],
        parameters: Mapping[str, str] | None = None,
        *,
        unnamed: Container[str] = (),
        is_whole: bool = True,
    ) -> None:
        self.spec = spec
        self.modules = tuple(modules)
        self.parameters = dict(parameters or {})
        self._unnamed = unnamed
        self._reductions: dict[tuple[str, str, bool], tuple[Reduction, ...]] = {}
        self._attention: dict[str, tuple[AttentionRequest, ...]] = {}
        is_strict = spec.is_strict and is_whole
        for rule in spec.rules if is_strict else ():
            _check_matches(rule, self.candidates(rule))
        if is_strict and not any(self.matched.values()):
            raise ValueError(
                f"{spec} measures nothing: exclude={spec.exclude!r} drops everything that a rule"
                " matches"
            )
        for rule in spec.rules:
            for name in self.candidates(rule):
                self.select(name, torch.float32, rule.family)  # finds collisions now
                self.attention(name)

    def select(
        self, name: str, dtype: torch.dtype, family: str = "activation"
    ) -> tuple[Reduction, ...]:
        """The reductions, in a family, of a tensor of that dtype of that module or parameter."""
        key = (family, name, dtype.is_complex)
        known = self._reductions.get(key)
        if known is None:
            matching = self._matching(name, rule_family(family))
            known = self._reductions[key] = _reductions(name, matching, dtype.is_complex)
        return known

    def attention(self, name: str) -> tuple[AttentionRequest, ...]:
        """What is asked of the attentions that the module of that name calls."""
        if name not in self._attention:
            self._attention[name] = tuple(_requests(name, self._matching(name, ATTENTION.name)))
        return self._attention[name]

    def has_operand_rows(self, name: str) -> bool:
        """Whether the refined coordinate check of that module is to record its operands, too."""
        return any(
            isinstance(rule, CoordinateCheckRule) and rule.operands
            for rule in self._matching(name, "rcc")
        )

    def _matching(self, name: str, family: str) -> list[Rule]:
        rules = (rule for rule in self.spec.rules if rule.family == family)
        return [rule for rule in rules if self._measures(rule, name)]

    def metrics(self, name: str, family: str = "activation") -> tuple[str, ...]:
        """The names of the metrics, in a family, of that module or parameter."""
        selected = self.select(name, torch.float32, family)
        return tuple(metric for reduction in selected for metric in reduction.metrics)

    @property
    def collected(self) -> tuple[Reduction, ...]:
        """The functions, of all names, whose aggregate needs all values."""
        found = (
            reduction
            for rule in self.spec.rules
            if rule.functions and not isinstance(rule.aggregate, str)
            for name in self.candidates(rule)
            for reduction in self.select(name, torch.float32, rule.family)
            if reduction.collects_values
        )
        return tuple(dict.fromkeys(found))

    @property
    def matched(self) -> dict[Rule, tuple[str, ...]]:
        """The names of the modules or parameters that each rule measures."""
        return {
            rule: tuple(name for name in self.candidates(rule) if self._measures(rule, name))
            for rule in self.spec.rules
        }

    def candidates(self, rule: Rule) -> Sequence[str]:
        """The names that the pattern of a rule is matched on."""
        return self.modules if rule.subject == "modules" else tuple(self.parameters)

    def _measures(self, rule: Rule, name: str) -> bool:
        if name in self._unnamed:
            return False
        owner = name if rule.subject == "modules" else self.parameters.get(name, name)
        return rule.matches(name) and not self.spec.excludes(owner)


def _reductions(name: str, rules: Iterable[Rule], is_complex: bool) -> tuple[Reduction, ...]:
    builtin: dict[str, Rule] = {}
    functions: dict[str, tuple[Reduction, Rule]] = {}
    for rule in rules:
        for metric in rule.metrics:
            builtin.setdefault(metric, rule)
        for metric, function in rule.functions:
            reduction = function_reduction(
                metric, function, rule.aggregate, trace=rule.trace, falls_back=rule.falls_back
            )
            known = functions.setdefault(metric, (reduction, rule))
            if known[0] != reduction:
                raise _collision(name, metric, known[1], rule)
    for metric in builtin.keys() & functions.keys():
        raise _collision(name, metric, builtin[metric], functions[metric][1])
    ordered = [*METRICS, *DERIVED_METRICS, *ATTENTION_METRICS, HISTOGRAM]
    names = tuple(metric for metric in ordered if metric in builtin)
    own = tuple(reduction for reduction, _ in functions.values())
    return builtin_reductions(names, is_complex=is_complex) + own


def _requests(name: str, rules: Iterable[Rule]) -> Iterator[AttentionRequest]:
    """One request for each way of looking at the heads and queries."""
    ways: dict[tuple[bool, int | None], list[Rule]] = {}
    counted: dict[tuple[bool, str], AttentionRule] = {}
    for rule in rules:
        assert isinstance(rule, AttentionRule)
        ways.setdefault((rule.pooled, rule.queries), []).append(rule)
        for metric in rule.metrics:
            known = counted.setdefault((rule.pooled, metric), rule)
            if metric in ATTENTION_METRICS and known.queries != rule.queries:
                raise _collision(name, metric, known, rule)
    parts: set[tuple[bool, Reduction]] = set()
    for (pooled, queries), some in ways.items():
        reductions = _reductions(name, some, is_complex=False)
        own = tuple(r for r in reductions if not r.is_of_attention and (pooled, r) not in parts)
        parts |= {(pooled, reduction) for reduction in own}
        statistics = tuple(reduction for reduction in reductions if reduction.is_of_attention)
        yield AttentionRequest(statistics, own, pooled, queries)


def _collision(name: str, metric: str, first: Rule, second: Rule) -> ValueError:
    return ValueError(
        f"{first} and {second} both give the metric {metric!r} to {first.subject[:-1]} {name!r};"
        " rename one of them"
    )


def _check_matches(rule: Rule, names: Sequence[str]) -> None:
    if any(rule.matches(name) for name in names):
        return
    if rule.pattern is None:
        raise ValueError(f"{rule}: the model has no {rule.subject}")
    if callable(rule.pattern):
        raise ValueError(
            f"{rule}: the predicate holds for none of the {len(names)} {rule.subject}, such as"
            f" {', '.join(map(repr, names[:5]))}"
        )
    literal = re.sub(r"[\\^$.*+?()\[\]{}|]+", ".", rule.pattern).strip(".")
    nearest = difflib.get_close_matches(literal, names, n=5, cutoff=0.0)
    raise ValueError(
        f"{rule}: {rule.subject}={rule.pattern!r} matches none of the {len(names)} {rule.subject}"
        f" (re.match, from the start of the name); the nearest are {', '.join(map(repr, nearest))}"
    )
