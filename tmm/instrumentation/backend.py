"""The compiler backend of the monitored program: the passes, then the user's own backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from tmm.core.inductor_private import inductor_config
from tmm.instrumentation.compile_settings import CompileSettings
from tmm.instrumentation.graph_breaks import begins_forward, is_whole
from tmm.instrumentation.graph_report import GraphReport, subject_of
from tmm.instrumentation.handle import Handle
from tmm.instrumentation.kernels_ahead import compile_kernels
from tmm.instrumentation.measured_graph import Host, MeasuredGraph, Witness
from tmm.instrumentation.reference.batch_prefix import LOST_ITEMS, Sampling
from tmm.instrumentation.scope import Scope
from tmm.kernels.attention.attention_host import SOURCES as ATTENTION_SOURCES
from tmm.kernels.build import start_compiling
from tmm.kernels.fused.merge_operator import VERSION as MERGE_VERSION
from tmm.kernels.fused.merge_operator import merge_parts, register_lowerings
from tmm.kernels.summarize.host import SOURCES as HOST_SOURCES
from tmm.passes.attention.multi_head import VERSION as MULTI_HEAD_VERSION
from tmm.passes.attention.multi_head import parts_of_multi_head
from tmm.passes.graph.dropout_functions import FUNCTIONS as MASKED
from tmm.passes.graph.dropout_functions import VERSION as MASKED_VERSION
from tmm.passes.graph.dropout_functions import draws_random_numbers
from tmm.passes.graph.values import argument_of, value_of
from tmm.passes.hide_from_partitioner import VERSION as HIDING_VERSION
from tmm.passes.hide_from_partitioner import hide_measuring, show_measuring
from tmm.passes.metrics.gradient_probe import VERSION as PROBE_VERSION
from tmm.passes.metrics.gradient_probe import probe, spread_rows
from tmm.passes.pipeline import Rewritten, rewrite
from tmm.passes.reference.prefix_branch import Samples
from tmm.passes.remove_evaluations import runs_without_gradients
from tmm.passes.request import ComparisonRequest, GraphRequest
from tmm.spec.reference import Reference

if TYPE_CHECKING:
    from tmm.instrumentation.reference.comparison import Comparing


class MeasuringBackend:
    """Rewrites each traced graph and hands it to the user's backend.

    ``handles`` are what Dynamo is given: of the backend, and of the graphs that it made.
    ``makes_whole_graphs`` tells whether each of these holds all that a call of the program runs.
    """

    def __init__(
        self, host: Host, settings: CompileSettings, sampling: Sampling | None = None
    ) -> None:
        self.host = host
        self.settings = settings
        self.sampling = sampling
        self.handles: list[Handle] = []
        self.makes_whole_graphs = False
        self._unmeasured: list[Callable[..., Any]] = []  # which handles do not keep alive

    def compiler(self) -> Callable[..., Any]:
        """What Dynamo is to call."""
        handle = Handle(self._compile)
        self.handles.append(handle)

        def compile_measured(module: GraphModule, inputs: list[torch.Tensor]) -> Handle:
            compiled: Handle = handle(module, inputs)
            return compiled

        # What Dynamo reads from a backend besides calling it.
        for name in ("get_compiler_config", "backend_ctx_ctor", "reset"):
            if hasattr(self.settings.backend, name):
                setattr(compile_measured, name, getattr(self.settings.backend, name))
        return compile_measured

    def close(self) -> None:
        """Let go of the model and of the compiled programs."""
        for handle in self.handles:
            handle.let_go()
        self.handles.clear()
        self._unmeasured.clear()

    def _compile(self, module: GraphModule, inputs: list[torch.Tensor]) -> Handle:
        """A graph that is measured; one as it was traced where only the measuring fails.

        The forward pass may have begun to write by now, and could not be run again.
        """
        try:
            return self._compile_measured(module, inputs)
        except Exception as error:
            if not self.host.is_bearing:
                raise
            run = self.settings.backend(module, inputs)  # raises what it raises unmeasured
            self._unmeasured.append(partial(self._run_unmeasured, run, error))
            self.handles.append(Handle(self._unmeasured[-1]))
            return self.handles[-1]

    def _run_unmeasured(
        self, run: Callable[..., Sequence[Any]], error: Exception, *inputs: object
    ) -> Sequence[Any]:
        self.host.bear(error)
        return run(*inputs)

    def _compile_measured(self, module: GraphModule, inputs: list[torch.Tensor]) -> Handle:
        scope, whole = self.host.scope(), is_whole(module)
        self.makes_whole_graphs = whole and (self.makes_whole_graphs or len(self.handles) == 1)
        _compile_for_cpu(inputs, scope)
        whole = scope.is_root and whole
        request = self._request(module, scope, self._comparison(module, scope, is_whole=whole))
        index, notes = len(self.host.graphs), self.host.notes
        if request.fuses:
            register_lowerings()
        rewritten = rewrite(module, request, watch=self._watch(index, module, scope))
        if rewritten.evaluations:
            self.host.leave_out_evaluations(rewritten.evaluations)
        samples = None if request.comparison is None else request.comparison.samples
        if samples is not None:
            self._check_sampling(module, rewritten, samples)
        self.host.leave_out(scope.owner, rewritten.layout.unmeasured)
        report = GraphReport.of(module, rewritten, scope, self.settings, index, notes)
        witness = Witness.of(module, scope.owner)
        added = list(rewritten.module.graph.find_nodes(op="placeholder"))[len(inputs) :]
        examples = [value_of(node) for node in added]
        notes.attempt(subject_of(index, scope), partial(compile_kernels, rewritten.module), None)
        with inductor_config().patch(_inductor_settings(self.settings)):
            run = self.settings.backend(rewritten.module, [*inputs, *examples])
        own = self.settings.draws_its_own_random_numbers and draws_random_numbers(module)
        graph = MeasuredGraph(
            *(run, rewritten, report, scope.owner, witness, self.host),
            examples=examples,
            has_own_randomness=own,
            loses_reference=samples is not None and not whole,
            is_evaluation=scope.is_step_function and runs_without_gradients(module),
        )
        self.host.graphs.append(graph)
        self.handles.append(Handle(graph))
        return self.handles[-1]

    def _comparison(
        self, module: GraphModule, scope: Scope, *, is_whole: bool
    ) -> ComparisonRequest | None:
        """What is compared with the reference; ``is_whole`` if the graph holds all of the model."""
        asked, comparing = scope.comparison, self.host.comparing
        if asked is None or comparing is None:
            return None
        samples, refusal = None, ""
        if not is_whole and not self._is_followed(module, comparing):
            refusal = LOST_ITEMS
        elif self.sampling is not None:
            samples = self.sampling.samples(module, comparing.batch)
        is_part = samples is None and (not is_whole or comparing.inputs.are_traced)
        parameter = partial(_id_of_held, comparing.reference)
        stays = partial(_counterpart_stays, comparing.reference)
        return ComparisonRequest(
            *(asked.select, asked.check, parameter, is_part, samples, refusal, stays)
        )

    def _request(
        self, module: GraphModule, scope: Scope, comparison: ComparisonRequest | None
    ) -> GraphRequest:
        uses_inductor = self.settings.uses_inductor
        return GraphRequest(
            *(scope.modules, scope.select, scope.values),
            select_further=scope.further,
            select_gradient=scope.select_gradient,
            scales_gradients=scope.select_gradient is not None and self.host.scales_gradients,
            select_attention=scope.attention,
            comparison=comparison,
            placements=scope.placements,
            begins_forward=begins_forward(),
            is_step_function=scope.is_step_function,
            keeps_unused=self.settings.keeps_unused_operations,
            writes_in_place=uses_inductor,
            fuses=uses_inductor and self.host.lowering != "operator",
            lowering=self.host.lowering,
        )

    def _watch(self, index: int, module: GraphModule, scope: Scope) -> Callable[..., None] | None:
        """Writes the graph after each pass, if somebody asks for that."""
        trace, notes = self.host.trace, self.host.notes
        if trace is None:
            return None
        folder = f"{trace.path}, {subject_of(index, scope)}"
        begun = notes.attempt(folder, lambda: trace.begin(index, module, scope.modules), None)
        return None if begun is None else notes.guarded(folder, begun)

    def _check_sampling(self, module: GraphModule, rewritten: Rewritten, samples: Samples) -> None:
        """See that the items that a reference sees are those of the model."""
        comparing, sampling = self.host.comparing, self.sampling
        assert sampling is not None
        assert comparing is not None
        assert comparing.batch is not None
        with comparing.inside_graph():
            sampling.check(rewritten, samples, comparing.batch)
        sampling.settle(module, samples, comparing.batch)

    def _is_followed(self, module: GraphModule, comparing: Comparing) -> bool:
        if self.sampling is None or comparing.batch is None:
            return True
        return self.sampling.is_followed(
            module, comparing.batch, comparing.reference, after_others=comparing.is_over
        )


def _id_of_held(reference: Reference, node: Node) -> int | None:
    """The ``id`` of the model's tensor that an input of a graph is, if the reference has it."""
    argument = argument_of(node)
    if argument is None or not reference.holds(argument.example):
        return None
    return id(argument.example)


def _counterpart_stays(reference: Reference, node: Node) -> bool:
    """Whether what a graph is given as the counterpart of an input lies where it lay before."""
    argument = argument_of(node)
    return argument is not None and reference.stays(argument.example)


def _compile_for_cpu(inputs: Sequence[object], scope: Scope) -> None:
    """Begin to compile tmm's own kernels, if all that a graph computes lies on a CPU."""
    tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if tensors and all(x.is_cpu for x in tensors):
        start_compiling(*HOST_SOURCES)
        if scope.attention is not None:
            start_compiling(*ATTENTION_SOURCES)


def _inductor_settings(settings: CompileSettings) -> dict[str, object]:
    """What Inductor is to know of our graphs."""
    # Compiled graphs are cached only if they call nothing but what is marked as cacheable.
    known = inductor_config().unsafe_marked_cacheable_functions
    ours = {probe: PROBE_VERSION, parts_of_multi_head: MULTI_HEAD_VERSION}
    ours |= {spread_rows: PROBE_VERSION, merge_parts: MERGE_VERSION}
    ours |= dict.fromkeys((*MASKED, *MASKED.values()), MASKED_VERSION)
    cacheable = {f"{f.__module__}.{f.__name__}": version for f, version in ours.items()} | known
    changed: dict[str, object] = {"unsafe_marked_cacheable_functions": cacheable}
    return changed | _partitioned_as_unmeasured() if settings.uses_inductor else changed


def _partitioned_as_unmeasured() -> dict[str, object]:
    """Settings of Inductor that have it keep what it would for the backward pass; see the pass."""
    name = "custom_partitioner_fn"
    users = getattr(inductor_config(), name, ...)
    if users is ...:
        return {}  # a torch without them
    from tmm.core.partitioner_private import ChangedPartitioner

    return {name: ChangedPartitioner(hide_measuring, show_measuring, HIDING_VERSION, users)}
