"""Comparisons with the reference of modules that run outside of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call
from torch.utils._pytree import tree_map

from tmm.core.families import ACTIVATION_DIFFERENCE
from tmm.core.metrics import Reduction
from tmm.core.records import Measurement, Site
from tmm.core.rng import RandomState
from tmm.instrumentation.attribution import Attribution, checked_module
from tmm.instrumentation.outputs import tensors_in
from tmm.instrumentation.reference.follower import Follower
from tmm.kernels.ops import why_unmeasurable
from tmm.kernels.pairs import ROW_NORM, normalized_norms, norms_without, reduce_pair, row_norms
from tmm.passes.insert_reference import (
    INPUT,
    INPUT_DIFFERENCE,
    INPUT_TERM,
    UPDATE_TERM,
    W_0_X_0,
    W_T_X_T,
    X_CHANGE,
    X_T,
)
from tmm.passes.request import CheckedModule
from tmm.runtime.eager_functions import reduce_pair_eagerly

Add = Callable[[Measurement, torch.Tensor], None]
"""Takes one row, or all values of a metric."""

Lose = Callable[[Measurement, str], None]
"""Takes what a call does not measure, and why."""

_PLAIN = (torch.Tensor, str, bytes, int, float, complex, bool, type(None), torch.dtype)
_CONTAINERS = (tuple, list, dict)


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
        if isinstance(given, torch.Tensor) and not why_unmeasurable(given):
            self._compare_input(name, given, checked)
        if self._follower.lost:
            return
        if not _is_plain((arguments, keywords)):
            self._attribution.unmeasured[f"{name}, refined coordinate check"] = (
                "it is called outside of graphs with an object that a second call could change"
            )
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
            site = Site(name, path)
            reference = self._differences(site, tensor, reductions)
            if checked is None:
                continue
            if reference is None:
                for family, of_weight in _terms(checked, site):
                    self._lose(_measurement(family, of_weight), self._why_not(tensor))
            elif entered is not None and entered.mixed is not None:
                own = tensor.detach()
                with torch.no_grad(), self._follower.paused():
                    self._check(site, module, checked, own, entered.mixed[path], reference)

    def show(self, site: Site, tensor: torch.Tensor) -> None:
        """Measure a tensor that the program shows under a name."""
        name = site.module + site.path
        reductions = self._attribution.plan.select(name, tensor.dtype, ACTIVATION_DIFFERENCE.name)
        if reductions and not why_unmeasurable(tensor):
            self._differences(site, tensor, reductions)

    def _differences(
        self, site: Site, tensor: torch.Tensor, reductions: tuple[Reduction, ...]
    ) -> torch.Tensor | None:
        """Measure a tensor against its counterpart, which is given back; None if it is lost."""
        with self._follower.paused():
            reference = self._follower.counterpart(tensor)
        if reference is None:
            for reduction in reductions:
                self._lose(
                    Measurement(ACTIVATION_DIFFERENCE.name, site, reduction), self._why_not(tensor)
                )
            return None
        with torch.no_grad(), self._follower.paused():
            for reduction in reductions:
                row = reduce_pair_eagerly(tensor.detach(), reference, reduction)
                self._add(Measurement(ACTIVATION_DIFFERENCE.name, site, reduction), row)
        return reference

    def _why_not(self, tensor: torch.Tensor) -> str:
        with self._follower.paused():
            return self._follower.why_unknown(tensor)

    def _compare_input(self, name: str, given: torch.Tensor, checked: CheckedModule) -> None:
        if checked.only_update:
            return
        with self._follower.paused():
            counterpart = self._follower.counterpart(given)
        if counterpart is None:
            for family, site in _input_rows(checked, name):
                self._lose(_measurement(family, site), self._why_not(given))
            return
        site, own = Site(name), given.detach()
        with torch.no_grad(), self._follower.paused():
            self._add(Measurement(INPUT, site, ROW_NORM), row_norms(own, ROW_NORM))
            row = reduce_pair(own, counterpart, ROW_NORM)
            self._add(Measurement(INPUT_DIFFERENCE, site, ROW_NORM), row)
            if (way := checked.normalization) is not None:
                row = normalized_norms(way, own)
                self._add(Measurement(UPDATE_TERM, Site(name, X_T), ROW_NORM), row)
                row = normalized_norms(way, own, counterpart)
                self._add(Measurement(INPUT_TERM, Site(name, X_CHANGE), ROW_NORM), row)

    def _check(
        self,
        site: Site,
        module: torch.nn.Module,
        checked: CheckedModule,
        own: torch.Tensor,
        mixed: torch.Tensor,
        reference: torch.Tensor,
    ) -> None:
        weight = Site(site.module, f"{site.path}.weight")

        def add(family: str, site: Site, a: torch.Tensor, b: torch.Tensor) -> None:
            self._add(Measurement(family, site, ROW_NORM), reduce_pair(a, b, ROW_NORM))

        add(UPDATE_TERM, site, own, mixed)
        if not checked.only_update:
            add(INPUT_TERM, site, mixed, reference)
        if not checked.has_weight_rows:
            return
        bias = getattr(module, "bias", None)
        initial = self._follower.reference.of(bias)
        if checked.has_operand_rows:
            for term, path, tensor, offset in (
                (UPDATE_TERM, W_T_X_T, own, bias),
                (INPUT_TERM, W_0_X_0, reference, initial),
            ):
                operand = Site(site.module, site.path + path)
                offsets = () if offset is None else (offset,)
                self._add(Measurement(term, operand, ROW_NORM), norms_without(tensor, *offsets))
        if bias is not None and initial is not None:
            own, without = own - bias.detach(), mixed - initial
            add(UPDATE_TERM, weight, own, without)
        else:
            add(UPDATE_TERM, weight, own, mixed)
        add(INPUT_TERM, weight, mixed, reference)

    def _repeat(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> Any:
        """What the module gives with the reference's parameters, changing nothing."""
        tensors = {}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            counterpart = self._follower.reference.of(tensor)
            tensors[name] = tensor.detach() if counterpart is None else counterpart
            if not isinstance(tensor, torch.nn.Parameter):
                tensors[name] = tensors[name].clone()  # a buffer may be written to
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


def _measurement(family: str, site: Site) -> Measurement:
    return Measurement(family, site, ROW_NORM)


def _input_rows(checked: CheckedModule, name: str) -> Iterator[tuple[str, Site]]:
    """The rows of the input of a module that is checked."""
    yield INPUT, Site(name)
    yield INPUT_DIFFERENCE, Site(name)
    if checked.normalization is not None:
        yield UPDATE_TERM, Site(name, X_T)
        yield INPUT_TERM, Site(name, X_CHANGE)


def _terms(checked: CheckedModule, site: Site) -> Iterator[tuple[str, Site]]:
    """The rows of an output of a module that is checked."""
    paths = [""]
    paths += [".weight"] if checked.has_weight_rows else []
    for path in paths:
        yield UPDATE_TERM, Site(site.module, site.path + path)
        if not checked.only_update:
            yield INPUT_TERM, Site(site.module, site.path + path)
    if checked.has_operand_rows:
        yield UPDATE_TERM, Site(site.module, site.path + W_T_X_T)
        yield INPUT_TERM, Site(site.module, site.path + W_0_X_0)


def _copy(value: object) -> object:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _is_plain(value: object) -> bool:
    if type(value) in _CONTAINERS:
        items = value.values() if isinstance(value, dict) else value
        return all(map(_is_plain, items))  # type: ignore[call-overload]
    return isinstance(value, _PLAIN)
