"""Comparisons with the reference of modules that run outside of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call

from tmm.core.families import ACTIVATION_DIFFERENCE
from tmm.core.records import Measurement, Site
from tmm.core.rng import RandomState
from tmm.core.torch_private import tree_map
from tmm.instrumentation.attribution import Attribution, checked_module
from tmm.instrumentation.outputs import tensors_in
from tmm.instrumentation.reference.follower import Follower
from tmm.instrumentation.reference.gathered_calls import (
    WithoutHooks,
    is_gathered,
    why_not_repeated,
)
from tmm.kernels.unreadable import why_unmeasurable
from tmm.passes.graph.sharding import why_unsummed
from tmm.passes.reference.comparison_rows import Operand, Term, comparison_rows, input_rows
from tmm.passes.request import CheckedModule
from tmm.runtime.eager_functions import apply_function
from tmm.spec.ranks import local_part, whole_of

Add = Callable[[Measurement, torch.Tensor], None]
"""Takes one row, or all values of a metric."""

Lose = Callable[[Measurement, str], None]
"""Takes what a call does not measure, and why."""

_PLAIN = (torch.Tensor, str, bytes, int, float, complex, bool, type(None), torch.dtype)
_CONTAINERS = (tuple, list, dict)

_IN_PARTS = "ranks share the model (tensor parallel), and it is called outside of graphs"


@dataclass(eq=False)
class _Entered:
    """A module that is running; ``mixed`` are its outputs with W_0 and the live inputs."""

    module: torch.nn.Module
    checked: CheckedModule | None
    mixed: dict[str, torch.Tensor] | None = None
    has_own_randomness: bool = False


class EagerComparison:
    """Measures modules that no graph holds against the reference, as ``insert_reference`` does."""

    def __init__(self, attribution: Attribution, follower: Follower, add: Add, lose: Lose) -> None:
        self._attribution = attribution
        self._follower = follower
        self._add = add
        self._lose = lose
        self._entered: list[_Entered] = []
        self.is_repeating = False

    def enter(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        """Measure the input, and run the module once more with the reference's parameters."""
        name = self._attribution.name(module)
        checked = checked_module(self._attribution.plan, name, module)
        self._entered.append(_Entered(module, checked))
        if checked is None:
            return
        given = next(iter((*arguments, *keywords.values())), None)
        terms = input_rows(name, checked)
        if terms and isinstance(given, torch.Tensor) and not why_unmeasurable(given):
            self._compare(terms, given)
        if self._follower.lost:
            return
        if not _is_plain((arguments, keywords)):
            self._attribution.unmeasured[f"{name}, refined coordinate check"] = (
                "it is called outside of graphs with an object that a second call could change"
            )
            return
        reason = why_not_repeated(module)
        if self._follower.reference.is_shared:
            reason = _IN_PARTS  # not all ranks might run its collectives once more
        if reason:
            self._attribution.unmeasured[f"{name}, refined coordinate check"] = reason
            return
        self._entered[-1].mixed = dict(tensors_in(self._repeat(module, arguments, keywords)))

    def note_own_randomness(self) -> None:
        """A graph ran inside the modules that are running, whose random numbers are its own."""
        for entered in self._entered:
            entered.has_own_randomness = True

    def leave(self, module: torch.nn.Module, output: object) -> None:
        """Measure what the module gives back."""
        while self._entered and self._entered[-1].module is not module:
            self._entered.pop()  # left by an exception
        entered = self._entered.pop() if self._entered else None
        name, plan = self._attribution.name(module), self._attribution.plan
        if entered is not None and entered.mixed is not None and entered.has_own_randomness:
            entered.mixed = None
            self._attribution.unmeasured[f"{name}, refined coordinate check"] = (
                "a graph in it draws random numbers of its own, which a second call would not draw"
            )
        for path, tensor in tensors_in(output):
            reductions = plan.select(name, tensor.dtype, ACTIVATION_DIFFERENCE.name)
            checked = None if entered is None else entered.checked
            if why_unmeasurable(tensor) or not (reductions or checked):
                continue
            site, reference = Site(name, path), self._counterpart(tensor)
            if reference is None:
                self._lose_all(comparison_rows(site, reductions, checked), tensor)
                continue
            operands: dict[Operand, torch.Tensor] = {"live": tensor, "reference": reference}
            if entered is None or entered.mixed is None:
                checked = None
            else:
                operands |= {"mixed": entered.mixed[path], **self._biases(module)}
            terms = comparison_rows(site, reductions, checked)
            # Keys have this order outside of graphs: the rows of the weight come last.
            weight = f"{path}.weight"
            self._measure(sorted(terms, key=lambda term: term.site.path == weight), operands)

    def show(self, site: Site, tensor: torch.Tensor) -> None:
        """Measure a tensor that the program shows under a name."""
        name = site.module + site.path
        reductions = self._attribution.plan.select(name, tensor.dtype, ACTIVATION_DIFFERENCE.name)
        if reductions and not why_unmeasurable(tensor):
            self._compare(comparison_rows(site, reductions), tensor)

    def _compare(self, terms: Iterable[Term], tensor: torch.Tensor) -> None:
        """Measure a tensor against its counterpart."""
        reference = self._counterpart(tensor)
        if reference is None:
            self._lose_all(terms, tensor)
        else:
            self._measure(terms, {"live": tensor, "reference": reference})

    def _counterpart(self, tensor: torch.Tensor) -> torch.Tensor | None:
        with self._follower.paused():
            return None if self._follower.lost else self._follower.counterpart(tensor)

    def _biases(self, module: torch.nn.Module) -> dict[Operand, torch.Tensor]:
        bias = getattr(module, "bias", None)
        with torch.no_grad(), self._follower.paused():
            initial = self._follower.reference.of(bias)
            biases: dict[Operand, torch.Tensor | None] = {"bias": bias, "reference bias": initial}
            return {n: whole_of(b) for n, b in biases.items() if isinstance(b, torch.Tensor)}

    def _measure(self, terms: Iterable[Term], operands: Mapping[Operand, torch.Tensor]) -> None:
        live = operands["live"]
        here = {name: local_part(tensor).detach() for name, tensor in operands.items()}
        with torch.no_grad(), self._follower.paused():
            for term in terms:
                measurement = self._attribution.compared(term.measurement, live)
                if reason := self._why_unsummed(measurement, live):
                    self._lose(measurement, reason)
                    continue
                values = [here[o] for o in term.given(operands.keys()).operands]
                if term.reduction.function is not None and not values[0].numel():
                    continue  # an empty part of a tensor, of which functions need not know
                if term.reduction.function is None:
                    row = term.computation(*values)
                else:  # it may change its arguments in place
                    row = apply_function(term.reduction, *(value.clone() for value in values))
                self._add(measurement, row)

    def _why_unsummed(self, measurement: Measurement, tensor: torch.Tensor) -> str | None:
        if measurement.share is not None and measurement.share.kind == "unsummed":
            return measurement.share.reason
        return why_unsummed(tensor)

    def _lose_all(self, terms: Iterable[Term], tensor: torch.Tensor) -> None:
        with self._follower.paused():
            reason = self._follower.why_unknown(tensor)
        for term in terms:
            self._lose(self._attribution.compared(term.measurement, tensor), reason)

    def _repeat(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> Any:
        """What the module gives with the reference's parameters, changing nothing."""
        tensors = {}
        with torch.no_grad(), self._follower.paused():
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                counterpart = self._follower.reference.of(tensor)
                tensors[name] = whole_of(tensor if counterpart is None else counterpart).detach()
                if not isinstance(tensor, torch.nn.Parameter):
                    tensors[name] = tensors[name].clone()  # a buffer may be written to
        if is_gathered(module):
            module = WithoutHooks(module)
            tensors = {f"inner.{name}": tensor for name, tensor in tensors.items()}
        given = tree_map(_copy, (arguments, keywords))
        state = RandomState.capture()
        repeating, self.is_repeating = self.is_repeating, True
        try:
            with (
                torch.no_grad(),
                self._follower.paused(),
                torch.compiler.set_stance("force_eager"),
            ):
                return functional_call(module, tensors, *given)
        finally:
            self.is_repeating = repeating
            state.restore()


def _copy(value: object) -> object:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _is_plain(value: object) -> bool:
    if type(value) in _CONTAINERS:
        items = value.values() if isinstance(value, dict) else value
        return all(map(_is_plain, items))  # type: ignore[call-overload]
    return isinstance(value, _PLAIN)
