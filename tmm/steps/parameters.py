"""Parameters, their gradients and their updates: measured when somebody says so."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from tmm.core.families import (
    GRADIENT,
    GRADIENT_BEFORE_CLIP,
    PARAMETER,
    PARAMETER_DIFFERENCE,
    UPDATE,
)
from tmm.core.keys import key_of, total_norm
from tmm.core.metrics import ALIGNMENT, HISTOGRAM, Reduction
from tmm.core.module_names import Assembly, ParameterNames, unwrapped
from tmm.kernels.dense import on_device
from tmm.passes.metrics.recognize_eager import KnownFunctions
from tmm.runtime.grouped_statistics import Measured, NamedStatistics, rows_at
from tmm.runtime.key_binding import KeyRegistry
from tmm.runtime.ranks.replica_rows import FOLLOWING
from tmm.runtime.step_collector import StepCollector
from tmm.runtime.tensor_copies import parts_of
from tmm.spec.ranks import Ranks, are_plain, is_sharded, summed
from tmm.spec.reference import Reference
from tmm.spec.spec import Plan
from tmm.steps.averaged_gradients import GradientAverage
from tmm.steps.localized import LocalizedParameters
from tmm.steps.replicas import Replicas, squares_of
from tmm.steps.written_later import WrittenLater

Tensors = dict[str, torch.Tensor]
Names = tuple[str, ...]
Choice = Callable[[Reduction], bool]
"""Which reductions are meant; hashable, and equal to those that choose the same."""


@dataclass(frozen=True, eq=False)
class Gradients:
    """Rows of gradients on their way to a collector, and the squares of the norm of each.

    ``replicas`` are numbers that are equal on all ranks that hold the same.
    """

    rows: tuple[Measured, ...] = ()
    squares: tuple[tuple[Names, torch.Tensor], ...] = ()
    replicas: tuple[tuple[Names, torch.Tensor], ...] = ()

    def __add__(self, other: Gradients) -> Gradients:
        squares, replicas = self.squares + other.squares, self.replicas + other.replicas
        return Gradients(self.rows + other.rows, squares, replicas)


_SHARDED = "a function needs the whole tensor, and each rank has a part; built-in metrics join"


class ParameterMonitor:
    """Measures the parameters of one model, their gradients and their updates.

    What has no rows is noted in ``unmeasured``, with the reason, and what is to be known of rows in
    ``remarks``; ``measured`` has, by family, the names of what had rows, ``stepped`` of what had a
    gradient when a watched optimizer stepped. Rows go to the collector
    that is given; norms of all gradients together, which several optimizers may add to, follow at
    the end of the step.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        plan: Plan,
        registry: KeyRegistry,
        unmeasured: dict[str, str],
        reference: Reference | None,
        ranks: Ranks,
        remarks: dict[str, str],
    ) -> None:
        self.module = module
        self.ranks = ranks
        self.plan = plan
        self.unmeasured = unmeasured
        self.remarks = remarks
        self.measured: dict[str, set[str]] = {}
        self.stepped: set[str] = set()
        self.written_later = WrittenLater()
        self.reference = reference
        self._statistics = NamedStatistics(registry, KnownFunctions().find)
        self._squares: dict[str, list[tuple[Names, torch.Tensor]]] = {}
        self._blocks: dict[str, str] = {}
        self._norms: dict[str, _Norms] = {}
        self._registry = registry
        self.replicas = Replicas(ranks)
        self._average = GradientAverage(ranks, is_wanted=plan.spec.average_gradients)
        self._names = ParameterNames(module)
        self._localized = LocalizedParameters(self._names)
        of_updates = [rule for rule in plan.spec.rules if rule.family == UPDATE.name]
        self._measures_alignment = any(ALIGNMENT in rule.metrics for rule in of_updates)
        self._updates_are_read_in_pairs = all(
            not rule.functions and HISTOGRAM not in rule.metrics for rule in of_updates
        )

    def wants(self, family: str) -> bool:
        """Whether the spec has a rule of that family."""
        return self.plan.spec.measures(family)

    def names(self) -> Mapping[torch.nn.Parameter, str]:
        """Names of the parameters that the model has now."""
        return {**self._localized.names, **self._names()} if self.is_taken_apart else self._names()

    def had_gradient(self, parameter: torch.nn.Parameter) -> bool:
        """Whether a parameter of the model has a gradient, or had one when it was stepped."""
        return parameter.grad is not None or self._names().get(parameter) in self.stepped

    @property
    def is_taken_apart(self) -> bool:
        """Whether parameters were taken out of the model, see ``LocalizedParameters``."""
        return bool(self._localized.names)

    def owns(self, name: str, tensor: torch.Tensor) -> bool:
        """Whether this rank measures what belongs to the parameter of that name."""
        return self.ranks.owns(self._localized.as_dtensor(name, tensor), name)

    def add_parameters(self, collector: StepCollector) -> None:
        """Measure all parameters as they are now."""
        tensors = {name: parameter.detach() for parameter, name in self.names().items()}
        if self.wants(PARAMETER.name):
            self.add(collector, PARAMETER.name, tensors)
        if self.reference is not None and self.wants(PARAMETER_DIFFERENCE.name):
            self._add_differences(collector, self.reference)

    def _add_differences(self, collector: StepCollector, reference: Reference) -> None:
        reference.look()
        tensors: Tensors = {}
        for parameter, name in self.names().items():
            if self.plan.metrics(name, PARAMETER_DIFFERENCE.name):
                if (reason := reference.why_not(parameter)) is None:
                    tensors[name] = parameter
                else:
                    self.unmeasured[f"{name}, compared with the reference"] = reason
        # Some at a time: all differences together would take as much memory as the model.
        for part in parts_of(tensors):
            own = {name: tensor.detach() for name, tensor in part.items()}
            found = {name: reference.of(tensor) for name, tensor in part.items()}
            counterparts = {name: other for name, other in found.items() if other is not None}
            self.add(collector, PARAMETER_DIFFERENCE.name, own, reference=counterparts)

    def measure_gradients(self, gradients: Tensors, *, before_clip: bool = False) -> Gradients:
        """Measure these gradients; all ranks do so together."""
        if not self.wants(GRADIENT.name) or not gradients:
            return Gradients()
        gradients = self._localized.as_dtensors(gradients)
        if not are_plain(gradients.values()):
            gradients = {name: summed(gradient) for name, gradient in gradients.items()}
        gradients = self._average.of(gradients)
        family = (GRADIENT_BEFORE_CLIP if before_clip else GRADIENT).name
        owned = self.ranks.owned(gradients)
        measured = self._measure(family, owned, rules=GRADIENT.name)
        known: set[str] = set()
        squares: list[tuple[Names, torch.Tensor]] = []
        for rows in measured:
            found = rows.squares()
            if found is not None:  # each gradient counts once, whatever else has its squares
                squares += _of_new_names(*found, known)
                known.update(found[0])
        others = {name: tensor for name, tensor in owned.items() if name not in known}
        squares += squares_of(others)
        replicas = tuple(self.replicas.numbers(gradients, squares))
        return Gradients(tuple(measured), tuple(squares), replicas)

    def without(self, gradients: Gradients, names: Container[str]) -> Gradients:
        """What was measured of the others."""
        rows = (self._statistics.without(rows, names) for rows in gradients.rows)
        squares, replicas = (
            tuple(part for some in parts for part in _of_new_names(*some, names))
            for parts in (gradients.squares, gradients.replicas)
        )
        return Gradients(tuple(part for part in rows if part is not None), squares, replicas)

    def add_gradients(
        self,
        collector: StepCollector,
        gradients: Gradients,
        *,
        before_clip: bool = False,
        unless: torch.Tensor | None = None,
    ) -> None:
        """Take rows of gradients, and note the norms."""
        for rows in gradients.rows:
            collector.add(rows.binding, rows.outputs, unless=unless)
        family = (GRADIENT_BEFORE_CLIP if before_clip else GRADIENT).name
        for names, numbers in gradients.replicas:
            self.replicas.add(collector, family, names, numbers, unless)
        for names, values in gradients.squares:
            if unless is not None:
                skipped = unless.to(values.device, non_blocking=True) > 0
                values = torch.where(skipped, torch.zeros_like(values), values)
            self._squares.setdefault(family, []).append((names, values))

    def compare_ranks(self, collector: StepCollector) -> None:
        """Let ranks compare their parameters, where nobody is known to keep them equal."""
        if self.replicas.is_needed and any(map(self.wants, FOLLOWING)):
            tensors = {name: parameter.detach() for parameter, name in self.names().items()}
            for names, numbers in self.replicas.numbers(tensors, ()):
                self.replicas.add(collector, PARAMETER.name, names, numbers)

    def add_update(
        self,
        collector: StepCollector,
        parameters: Tensors,
        before: Tensors,
        unless: torch.Tensor | None,
    ) -> None:
        """Measure what was added to parameters since ``before``, which is used up."""
        self.written_later.note(parameters)
        now = {name: parameter.detach() for name, parameter in parameters.items()}
        measure = partial(self.add, collector, UPDATE.name, unless=unless)
        measure(now, reference=before, choose=_reads_both)
        self._add_alignment(now, before, measure)
        if self._updates_are_read_in_pairs:
            return
        differences = {
            name: torch.sub(now[name], before[name], out=before[name])
            for name in now
            if any(map(_needs_difference, self.plan.select(name, now[name].dtype, UPDATE.name)))
        }
        measure(differences, choose=_needs_difference)

    def _add_alignment(self, now: Tensors, before: Tensors, measure: Callable[..., None]) -> None:
        """Measure the angle between what was added and what was there, some at a time."""
        if not self._measures_alignment:
            return
        wanted = {
            name: tensor
            for name, tensor in now.items()
            if any(map(_is_alignment, self.plan.select(name, tensor.dtype, UPDATE.name)))
        }
        for part in parts_of(wanted):
            wide = {
                n: torch.promote_types(tensor.dtype, torch.float32) for n, tensor in part.items()
            }
            there = {name: before[name].to(dtype) for name, dtype in wide.items()}
            added = {name: part[name].to(dtype) - there[name] for name, dtype in wide.items()}
            measure(added, reference=there, choose=_is_alignment)

    def add(
        self,
        collector: StepCollector,
        family: str,
        tensors: Tensors,
        *,
        rules: str | None = None,
        reference: Tensors | None = None,
        unless: torch.Tensor | None = None,
        choose: Choice | None = None,
        is_own: bool = False,
    ) -> None:
        """Measure tensors by the rules of a family (or of ``rules``), those that are chosen.

        With ``reference`` they are compared with the tensors there. Tensors that another rank
        measures are left out, but with ``is_own``, where no other rank has them; of sharded ones
        what is no statistic of all elements.
        """
        tensors = self._localized.as_dtensors(tensors)
        if reference is not None:
            reference = self._localized.as_dtensors(reference)
        if not is_own:
            tensors = self.ranks.owned(tensors)
        measured = self._measure(family, tensors, rules=rules, reference=reference, choose=choose)
        for rows in measured:
            collector.add(rows.binding, rows.outputs, unless=unless)

    def _measure(
        self,
        family: str,
        tensors: Tensors,
        *,
        rules: str | None = None,
        reference: Tensors | None = None,
        choose: Choice | None = None,
    ) -> list[Measured]:
        def select(name: str, dtype: torch.dtype) -> tuple[Reduction, ...]:
            selected = self.plan.select(name, dtype, rules or family)
            if is_sharded(tensors[name]):
                for reduction in selected:
                    if reduction.function is not None:
                        self.unmeasured[key_of(family, name, reduction.metrics[0])] = _SHARDED
                selected = tuple(r for r in selected if r.function is None)
            return tuple(r for r in selected if choose is None or choose(r))

        self.measured.setdefault(rules or family, set()).update(tensors)
        sharded: frozenset[str] = frozenset()
        if not are_plain(tensors.values()):
            sharded = frozenset(filter(lambda name: is_sharded(tensors[name]), tensors))
        chosen = (rules, choose, sharded)
        return self._statistics.measure(family, tensors, select, chosen, reference=reference)

    def end_step(self, collector: StepCollector | None) -> None:
        """Record the norms of the step; without a collector, forget them."""
        squares, self._squares = self._squares, {}
        self.written_later.forget()
        if collector is None:
            return
        for family, parts in squares.items():
            device = parts[0][1].device
            names = tuple([name for some, _ in parts for name in some])
            values = parts[0][1]
            if len(parts) > 1:
                values = torch.cat([some.to(device, non_blocking=True) for _, some in parts])
            norms = self._norms_of(family, names, device)
            of_blocks = values.new_zeros(len(norms.keys) - 1).index_add_(0, norms.places, values)
            sums = torch.cat([values.sum(0, keepdim=True), of_blocks])
            collector.add_numbers(norms.keys, sums.sqrt_(), "norm")

    def _norms_of(self, family: str, names: Names, device: torch.device) -> _Norms:
        known = self._norms.get(family)  # those of the last step, which most steps have again
        if known is None or known.names != names or known.places.device != device:
            for name in names:
                if name not in self._blocks:
                    self._blocks[name] = block_of(self.module, name)
            blocks = list(dict.fromkeys(self._blocks[name] for name in names))
            places = [blocks.index(self._blocks[name]) for name in names]
            for block in ("", *blocks):
                own = (name for name in names if block in ("", self._blocks[name]))
                key = total_norm(family, block)
                self._registry.derive(key, (key_of(family, name) for name in own))
            known = _Norms(
                names,
                tuple(total_norm(family, block) for block in ("", *blocks)),
                on_device(torch.tensor(places, device="cpu"), device),
            )
            self._norms[family] = known
        return known


def _of_new_names(
    names: Names, values: torch.Tensor, known: Container[str]
) -> Iterator[tuple[Names, torch.Tensor]]:
    """The names that are not known yet, and their values, if there are any."""
    places = [place for place, name in enumerate(names) if name not in known]
    if len(places) == len(names):
        yield names, values
    elif places:
        yield tuple(names[place] for place in places), rows_at(values, places)


@dataclass(frozen=True, eq=False)
class _Norms:
    """The norms of some gradients: their keys, of all and of each block, and each one's block."""

    names: Names
    keys: tuple[str, ...]
    places: torch.Tensor


def _reads_both(reduction: Reduction) -> bool:
    """Whether it can be taken of two tensors at once, without their difference."""
    is_difference = reduction.is_histogram or reduction.metrics == (ALIGNMENT,)
    return reduction.function is None and not is_difference


def _needs_difference(reduction: Reduction) -> bool:
    return not _reads_both(reduction) and not _is_alignment(reduction)


def _is_alignment(reduction: Reduction) -> bool:
    """Whether it is taken of the difference and of what that has led to."""
    return reduction.function is None and reduction.metrics == (ALIGNMENT,)


def block_of(module: torch.nn.Module, parameter: str) -> str:
    """The block that a parameter belongs to: an element of an outermost list, else a child."""
    if isinstance(module, Assembly):
        module = module.around(parameter)
    parts = parameter.split(".")[:-1]
    for depth, part in enumerate(parts):
        is_list = isinstance(unwrapped(module), (torch.nn.ModuleList, torch.nn.Sequential))
        if is_list:
            return ".".join(parts[: depth + 1])
        child = unwrapped(module)._modules.get(part)
        if child is None:
            break  # a name that tells modules apart which wrappers give the same one
        module = child
    return parts[0] if parts else parameter
