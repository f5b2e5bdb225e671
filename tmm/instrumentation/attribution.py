"""Which module a measured row belongs to."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from tmm.core.failures import MonitoringWarning, levels_to_user
from tmm.core.families import (
    ACTIVATION,
    ACTIVATION_DIFFERENCE,
    ATTENTION,
    BRANCH_FAMILIES,
    VALUE_FAMILY,
    families_of_outputs,
    rule_family,
)
from tmm.core.keys import parts_of
from tmm.core.metrics import Reduction
from tmm.core.module_names import (
    Assembly,
    display_name,
    owner_names,
    parameter_names,
    relative_names,
    unwrapped,
)
from tmm.core.records import (
    ATTENTION_MARK,
    OUTSIDE,
    ROOT_NAME,
    AttentionRequest,
    Measurement,
    PackedLayout,
    Share,
    Site,
)
from tmm.instrumentation.eager_shares import share_of_rows_outside, share_outside
from tmm.instrumentation.measured_graph import MeasuredGraph
from tmm.instrumentation.outputs import tensors_in
from tmm.instrumentation.scope import Comparison, Scope
from tmm.kernels.pairs import Normalization
from tmm.kernels.unreadable import why_unmeasurable
from tmm.passes.graph.sharding import why_unsummed
from tmm.passes.insert_gradient_probes import NOT_JOINED
from tmm.passes.metrics.gradient_rows import FAMILY as GRADIENT
from tmm.passes.reference.clone_nodes import BRANCH
from tmm.passes.request import CheckedModule, PlacementRequest
from tmm.runtime.key_binding import Binding, KeyRegistry, single_row
from tmm.spec.ranks import Ranks, is_distributed
from tmm.spec.spec import Plan

Frames = Sequence[torch.nn.Module]
"""The modules whose forward is running, the innermost last."""

_PLACED_ELSEWHERE = Share(
    "unknown", "ranks share the inputs of its graph in another way than when it was traced"
)

_IF_EQUAL = (
    "nothing in the model is known to average gradients over ranks: where they are equal on all"
    " ranks, they are those of the whole batch; where not, rows are of this rank alone, under keys"
    " with [rank 0] (tmm.Spec(average_gradients=True) averages them to be measured)"
)
_AVERAGED = "the averages over ranks of what each has when it is measured (average_gradients=True)"


class Attribution:
    """Names the rows of graphs and of eager calls, for the modules of one model.

    A graph may serve several equal modules. Its rows are credited when it runs: to the module
    whose frame is running, as a parameter among the graph's inputs confirms.

    ``rows`` are all measurements so far, with names as in keys; ``unmeasured`` are the sites that
    were asked for and have none, with the reason, and ``lost_attention`` the attentions among them;
    ``by_rank`` those whose rows of several ranks are not joined; ``remarks`` is what else is to be
    known of rows.
    """

    def __init__(
        self, root: torch.nn.Module, plan: Plan, registry: KeyRegistry, ranks: Ranks
    ) -> None:
        self.root = unwrapped(root)
        self.plan = plan
        self.ranks = ranks
        self.names = relative_names(root)
        self.unmeasured: dict[str, str] = {}
        self.lost_attention: dict[str, str] = {}
        self.by_rank: dict[str, str] = {}
        self.remarks: dict[str, str] = {}
        self._registry = registry
        self._bindings: dict[tuple[int, torch.nn.Module, bool, bool], Binding | None] = {}
        self._eager: dict[Measurement, Binding] = {}
        self.rows: dict[Measurement, None] = {}
        self._measured: dict[str, dict[str, None]] = {}
        self._has_warned = False

    @property
    def splits_backward(self) -> bool:
        """Whether a backward pass may leave gradients of parameters to a later one.

        Schedules of pipelines do, by ``torch.autograd.grad``.
        """
        return isinstance(self.root, Assembly)

    @property
    def notes(self) -> dict[str, str]:
        """What is to be known of rows beyond their names: of families, sites and the rest."""
        of_families = {rule.family: self.ranks.notes(rule.family) for rule in self.plan.spec.rules}
        noted = {family: note for family, note in of_families.items() if note}
        if "gradient" in of_families and not self.ranks.averages:
            noted["gradient"] = _AVERAGED if self.plan.spec.average_gradients else _IF_EQUAL
        for site, note in self._registry.site_notes.items():
            if parts_of(site)[0].removesuffix("_before_clip") in of_families:
                noted[site] = note
        return noted | self.remarks

    def refresh(self) -> None:
        """Learn of modules that were added to the model."""
        self.names = relative_names(self.root)

    def name(self, module: torch.nn.Module) -> str:
        """The name of a module in keys; its type for one that is not part of the model."""
        return display_name(self.names.get(module, type(module).__name__))

    def how_measured(self, module: torch.nn.Module) -> str:
        """Where the rows of a module came from so far: graph, eager, or both."""
        return " and ".join(self._measured.get(self.name(module), ()))

    # Graphs

    def scope(self, owner: torch.nn.Module, values: Mapping[str, Reduction]) -> Scope:
        """The scope of a frame of ``owner`` that is being compiled."""
        modules = {id(module): OUTSIDE + name for module, name in self.names.items()}
        modules |= {id(module): name for module, name in relative_names(owner).items()}
        # Equal modules may come to share the graph: it measures what any of them asks for.
        peers = [module for module in self.names if type(module) is type(owner)]
        resolvers = [self._resolver(peer) for peer in peers]

        def select(
            site: Site, dtype: torch.dtype, family: str = "activation"
        ) -> tuple[Reduction, ...]:
            names = [name for resolve in resolvers if (name := resolve(site.module)) is not None]
            path = site.path if site.is_shown else ""
            selected = [r for name in names for r in self.plan.select(name + path, dtype, family)]
            return tuple(dict.fromkeys(selected))

        own = {name: module for module, name in relative_names(owner).items()}

        def check(relative: str) -> CheckedModule | None:
            module = own.get(relative)
            names = [name for resolve in resolvers if (name := resolve(relative)) is not None]
            checks = [checked_module(self.plan, name, module) for name in names if module]
            return next((found for found in checks if found is not None), None)

        comparison = None
        if any(self.plan.spec.measures(family) for family in BRANCH_FAMILIES):
            comparison = Comparison(partial(select, family=ACTIVATION_DIFFERENCE.name), check)
        attention = None
        if self.plan.spec.measures(ATTENTION.name):

            def attention(relative: str) -> tuple[AttentionRequest, ...]:
                names = [name for resolve in resolvers if (name := resolve(relative)) is not None]
                requests = [request for name in names for request in self.plan.attention(name)]
                return tuple(dict.fromkeys(requests))

        gradient = None
        if self.plan.spec.measures(GRADIENT):
            gradient = partial(select, family=GRADIENT)
        others = (f for f in families_of_outputs() if f != ACTIVATION.name)
        further = {f: partial(select, family=f) for f in others if self.plan.spec.measures(f)}
        return Scope(
            *(owner, self.name(owner), modules, select, values, gradient, comparison),
            attention=attention,
            placements=self._placements(owner, peers),
            is_root=owner is self.root,
            further=further,
        )

    def _placements(
        self, owner: torch.nn.Module, peers: Iterable[torch.nn.Module]
    ) -> PlacementRequest | None:
        """How ranks share the model; parameters count as equal if those of all peers are."""
        shared = self.ranks.tensor_parallel
        if shared is None:
            return None
        names = owner_names(self.root)
        prefixes = [f"{names[peer]}." if names.get(peer) else "" for peer in peers]
        equal = (
            id(parameter)
            for parameter, (name, _) in parameter_names(owner).items()
            if all(prefix + name in shared.equal for prefix in prefixes)
        )
        return PlacementRequest(shared.ranks, shared.is_first, frozenset(equal))

    def lose(self, measurement: Measurement, reason: str) -> Binding:
        """A site, named as in keys, is not compared with the reference in a forward pass.

        Its row of the step is left out by the binding: other forward passes would be a part of it.
        So are those of other ranks that share the tensor, whichever name they have: what they
        measure was computed from what this rank has.
        """
        shared, places = self.ranks.tensor_parallel, [measurement.site]
        if shared is not None:
            places += [replace(measurement.site, rank=rank) for rank in sorted(shared.ranks)]
        found = (self._registry.site(measurement.family, place) for place in places)
        lost = tuple(name for name in found if name is not None)
        if not lost:
            return Binding((), ())
        name = measurement.site.module + measurement.site.path
        self.unmeasured[f"{name}, compared with the reference"] = reason
        self._warn_once(name, reason)
        return Binding((), (), lost)

    def _warn_once(self, name: str, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"{name} cannot be compared with the reference: {reason}. Where that is so it has"
                " no rows; tmm.explain(model).unmeasured lists what has none, and why",
                MonitoringWarning,
                stacklevel=levels_to_user(),
            )

    def leave_out(self, owner: torch.nn.Module, unmeasured: tuple[tuple[Site, str], ...]) -> None:
        """Remember which sites of a frame of ``owner`` have no rows, and why."""
        resolve = self._resolver(owner)
        for site, reason in unmeasured:
            name = (resolve(site.module) or site.module) + site.path
            self.unmeasured[name] = reason
            if site.path.endswith(ATTENTION_MARK):
                self.lost_attention[name] = reason
            if reason.startswith(BRANCH):
                self._warn_once(name, reason.removeprefix(f"{BRANCH}: "))

    def bind(
        self,
        graph: MeasuredGraph,
        layout: PackedLayout,
        inputs: Sequence[object],
        frames: Frames,
        *,
        lost: str = "",
    ) -> Binding | None:
        """The rows of a call of ``graph``, named; None if it is not known which module ran it.

        ``lost`` tells why those of the reference are left out, if they are.
        """
        owner = self._owner(graph, inputs, frames)
        if owner is None:
            self.unmeasured[f"a {type(graph.owner).__name__}"] = "it is not known which one ran"
            return None
        are_placed = graph.placed_ends.hold_for(tuple(inputs))
        key = (id(layout), owner, not lost, are_placed)
        if key not in self._bindings:
            self._bindings[key] = self._bind(graph, layout, owner, lost, are_placed=are_placed)
        return self._bindings[key]

    def _owner(
        self, graph: MeasuredGraph, inputs: Sequence[object], frames: Frames
    ) -> torch.nn.Module | None:
        owner = frames[-1]
        if graph.witness is None:
            return owner
        parameter = inputs[graph.witness.input]
        if owner is graph.owner is self.root:
            # Another one of its parameters: the graph runs for another part than it was traced for.
            is_other = _parameter(owner, graph.witness.parameter) is not parameter and any(
                parameter is each for each in owner.parameters()
            )
            return None if is_other else owner
        for candidate in (owner, *reversed(frames), *self.names):
            if (
                type(candidate) is type(graph.owner)
                and _parameter(candidate, graph.witness.parameter) is parameter
            ):
                return candidate
        return owner if owner is graph.owner else None

    def _bind(
        self,
        graph: MeasuredGraph,
        layout: PackedLayout,
        owner: torch.nn.Module,
        lost: str,
        *,
        are_placed: bool,
    ) -> Binding | None:
        if type(owner) is not type(graph.owner):
            self.unmeasured[self.name(owner)] = f"ran a graph of a {type(graph.owner).__name__}"
            return None
        absolute = self._resolver(owner)
        left_out: list[str] = []

        def resolve(measurement: Measurement) -> Site | None:
            if not are_placed:
                measurement = replace(measurement, share=_PLACED_ELSEWHERE)
            if measurement.family == VALUE_FAMILY:
                return self._placed(measurement)
            name = absolute(measurement.site.module)
            if name is None:
                return None
            site = replace(measurement.site, module=name)
            if not site.is_shown and graph.outside(measurement) and owner is not graph.owner:
                return None
            if not self._is_wanted(replace(measurement, site=site)):
                return None
            if lost and rule_family(measurement.family) in BRANCH_FAMILIES:
                left_out.extend(self.lose(replace(measurement, site=site), lost).left_out)
                return None
            self._measured.setdefault(name, {})["graph"] = None
            return self._placed(replace(measurement, site=site))

        self.leave_out(owner, layout.unmeasured)
        binding = self._registry.bind(layout, resolve)
        return replace(binding, left_out=tuple(left_out))

    def _placed(self, measurement: Measurement) -> Site | None:
        """Where this rank records a measurement, whose site is named as in keys."""
        site = self.ranks.placed(measurement, self.by_rank)
        family, reduction = measurement.family, measurement.reduction
        if site is not None and self._registry.claim(family, site, reduction) is not None:
            self.rows[replace(measurement, site=site)] = None
        return site

    def _is_wanted(self, measurement: Measurement) -> bool:
        """Whether a rule asks for the measurement, whose site is named as in keys."""
        site, family = measurement.site, measurement.family
        if measurement.is_of_attention:
            if site.is_shown:
                return True  # it was asked for by the call
            family = ATTENTION.name
        name = site.module + site.path if site.is_shown else site.module
        wanted = [*self.plan.select(name, torch.float32, family)]
        wanted += self.plan.select(name, torch.complex64, family)
        return measurement.reduction in wanted

    def _resolver(self, owner: torch.nn.Module) -> Callable[[str], str | None]:
        """From names relative to ``owner`` to those in keys: a shared module has its first name."""
        modules = {name: module for module, name in relative_names(owner).items()}

        def resolve(name: str) -> str | None:
            if name.startswith(OUTSIDE):
                return display_name(name.removeprefix(OUTSIDE))
            module = modules.get(name)
            return None if module not in self.names else display_name(self.names[module])

        return resolve

    # Eager calls

    def select_eagerly(
        self, module: torch.nn.Module, output: object, *families: str
    ) -> list[tuple[Binding, torch.Tensor, Reduction]]:
        """What to reduce of the output of a module that ran outside of every graph.

        It is for ``families``, without any for all that are of outputs.
        """
        name = display_name(self.names[module])
        selected = []
        chosen = families or families_of_outputs()
        for (path, tensor), family in product(tensors_in(output), chosen):
            reductions = self.plan.select(name, tensor.dtype, family)
            is_gradient = family == GRADIENT
            share = self.share_of(tensor, of_gradient=is_gradient)
            reason = why_unmeasurable(tensor)
            if share is not None and share.kind == "unsummed":
                reason = reason or ("gradient: " if is_gradient else "") + share.reason
            if share is None and is_gradient and is_distributed(tensor):
                reason = reason or f"gradient: {NOT_JOINED}"
            reason = reason or (None if is_gradient else why_unsummed(tensor))
            if reductions and reason:
                self.unmeasured[name + path] = reason
                continue
            if reductions:
                self.note_eager(name)
            for reduction in reductions:
                measurement = Measurement(family, Site(name, path), reduction, share)
                selected.append((self.bind_eagerly(measurement), tensor, reduction))
        return selected

    def note_eager(self, name: str) -> None:
        """Remember that a module, named as in keys, was measured outside of graphs."""
        self._measured.setdefault(name, {})["eager"] = None

    def bind_layout(self, layout: PackedLayout) -> Binding:
        """The binding of rows outside of graphs, whose sites are named as in keys."""
        return self._registry.bind(layout, self._placed)

    def shown_site(self, owner: torch.nn.Module | str, path: str) -> Site:
        """The site, named as in keys, of what the program shows under a name or a module."""
        if isinstance(owner, str):
            return Site(owner + path, is_shown=True)
        return Site(self.name(owner), path, is_shown=bool(path))  # else it is like an output

    def select_shown(self, site: Site, tensor: torch.Tensor) -> list[tuple[Binding, Reduction]]:
        """What to reduce of a tensor that the program shows outside of every graph."""
        name = site.module + site.path
        wanted = [
            (family, reduction)
            for family in families_of_outputs()
            for reduction in self.plan.select(name, tensor.dtype, family)
        ]
        if wanted and (reason := why_unmeasurable(tensor)):
            self.unmeasured[name] = reason
            return []
        share = self.share_of(tensor)
        found = (Measurement(family, site, reduction, share) for family, reduction in wanted)
        return [(self.bind_eagerly(measurement), measurement.reduction) for measurement in found]

    def bind_eagerly(self, measurement: Measurement) -> Binding:
        """The binding of one measurement whose site is named as in keys."""
        if measurement not in self._eager:
            self._eager[measurement] = self.bind_layout(single_row(measurement))
        return self._eager[measurement]

    def share_of(self, tensor: torch.Tensor, *, of_gradient: bool = False) -> Share | None:
        """What this rank has of a tensor outside of every graph, where ranks share tensors."""
        shared = self.ranks.tensor_parallel
        return None if shared is None else share_outside(tensor, shared, of_gradient=of_gradient)

    def compared(self, measurement: Measurement, tensor: torch.Tensor) -> Measurement:
        """A measurement of a tensor outside of every graph, with what this rank has of that."""
        shared = self.ranks.tensor_parallel
        if shared is None:
            return measurement
        if measurement.reduction.is_row_norm:
            return replace(measurement, share=share_of_rows_outside(tensor, shared))
        return replace(measurement, share=share_outside(tensor, shared, of_gradient=False))


def checked_module(plan: Plan, name: str, module: torch.nn.Module) -> CheckedModule | None:
    """What the refined coordinate check asks of a module of that name; nothing of the root."""
    if name == ROOT_NAME or not plan.select(name, torch.float32, "rcc"):
        return None
    if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag)):
        return CheckedModule(only_update=True)
    is_norm = isinstance(module, torch.nn.LayerNorm) or type(module).__name__.endswith("RMSNorm")
    if not isinstance(module, torch.nn.Linear) and not is_norm:
        return CheckedModule()
    bias = getattr(module, "bias", None)
    checked = CheckedModule(has_weight_rows=True, bias=None if bias is None else id(bias))
    if not plan.has_operand_rows(name):
        return checked
    normalization = None
    if isinstance(module, torch.nn.LayerNorm):
        normalization = Normalization(module.normalized_shape, module.eps)
    return replace(checked, has_operand_rows=True, normalization=normalization)


def _parameter(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """What stands in the place of a parameter: ``functional_call`` puts other tensors there."""
    owner, _, own_name = name.rpartition(".")
    try:
        return module.get_submodule(owner)._parameters.get(own_name)
    except AttributeError:
        return None
