"""The compiler backend of the monitored program: the passes, then the user's own backend."""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.fx import GraphModule, Node

from tmm.core.inductor_private import inductor_config
from tmm.core.metrics import Reduction
from tmm.core.records import OUTSIDE, AttentionRequest, Measurement, Site
from tmm.core.torch_private import FakeTensor
from tmm.instrumentation.compile_settings import CompileSettings
from tmm.instrumentation.graph_breaks import begins_forward, end_of_graph, is_whole
from tmm.instrumentation.kernels_ahead import compile_kernels
from tmm.instrumentation.notes import Notes
from tmm.instrumentation.pass_trace import TraceFolder
from tmm.instrumentation.reference.batch_prefix import LOST_ITEMS, Sampling
from tmm.kernels.attention.attention_host import SOURCES as ATTENTION_SOURCES
from tmm.kernels.build import start_compiling
from tmm.kernels.fused.choose_lowering import Lowering
from tmm.kernels.fused.merge_operator import VERSION as MERGE_VERSION
from tmm.kernels.fused.merge_operator import merge_parts, register_lowerings
from tmm.kernels.summarize.host import SOURCES as HOST_SOURCES
from tmm.passes.attention.multi_head import VERSION as MULTI_HEAD_VERSION
from tmm.passes.attention.multi_head import parts_of_multi_head
from tmm.passes.findings import Lowered, RowInput
from tmm.passes.graph.dropout_functions import FUNCTIONS as MASKED
from tmm.passes.graph.dropout_functions import VERSION as MASKED_VERSION
from tmm.passes.graph.dropout_functions import draws_random_numbers
from tmm.passes.graph.printer import NodeLine, node_lines, runnable_code
from tmm.passes.graph.readings import hinted_elements, readings
from tmm.passes.graph.values import argument_of, value_of
from tmm.passes.hide_from_partitioner import VERSION as HIDING_VERSION
from tmm.passes.hide_from_partitioner import hide_measuring, show_measuring
from tmm.passes.metrics.gradient_probe import VERSION as PROBE_VERSION
from tmm.passes.metrics.gradient_probe import probe, spread_rows
from tmm.passes.pipeline import Rewritten, rewrite
from tmm.passes.remove_evaluations import runs_without_gradients
from tmm.passes.request import CheckedModule, ComparisonRequest, GraphRequest, PlacementRequest
from tmm.spec.reference import Reference

if TYPE_CHECKING:
    from tmm.instrumentation.reference.comparison import Comparing


@dataclass(frozen=True)
class Comparison:
    """What is compared with a reference: see ``ReferenceOptions``."""

    select: Callable[[Site, torch.dtype], tuple[Reduction, ...]]
    check: Callable[[str], CheckedModule | None]


@dataclass(frozen=True)
class Scope:
    """Where a frame is traced: its module (the owner) and what modules are called from there.

    ``further`` selects for further families of outputs. ``values`` says how what the model records
    by name is reduced, ``select_gradient`` which gradients of outputs are measured, ``comparison``
    what is compared and ``attention`` what is asked of attentions (None if nothing is),
    ``placements`` how ranks share the model, if they do; ``is_root`` tells that the owner is the
    whole model, ``is_step_function`` that the frame is that of a function that calls it.
    """

    owner: torch.nn.Module
    owner_name: str
    modules: Mapping[int, str]
    select: Callable[[Site, torch.dtype], tuple[Reduction, ...]]
    values: Mapping[str, Reduction]
    select_gradient: Callable[[Site, torch.dtype], tuple[Reduction, ...]] | None = None
    comparison: Comparison | None = None
    attention: Callable[[str], tuple[AttentionRequest, ...]] | None = None
    placements: PlacementRequest | None = None
    is_root: bool = False
    is_step_function: bool = False
    further: Mapping[str, Callable[[Site, torch.dtype], tuple[Reduction, ...]]] = field(
        default_factory=dict
    )


class Host(Protocol):
    """The side of the running program that a backend needs."""

    graphs: list[MeasuredGraph]
    trace: TraceFolder | None
    notes: Notes
    lowering: Lowering

    @property
    def comparing(self) -> Comparing | None:
        """What is known of the reference, if the model is compared with one."""

    @property
    def frame(self) -> torch.nn.Module:
        """The module whose frame is running."""

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients carry a scaler's factor that is to be taken out."""

    def scope(self) -> Scope:
        """The scope of the frame that is being compiled."""

    def leave_out(self, owner: torch.nn.Module, unmeasured: tuple[tuple[Site, str], ...]) -> None:
        """Remember which sites of a frame of ``owner`` have no rows, and why."""

    def leave_out_evaluations(self, count: int) -> None:
        """Remember how many calls of the model a graph of a step function does not measure."""

    def collect(
        self,
        graph: MeasuredGraph,
        inputs: Sequence[object],
        extra: Sequence[torch.Tensor],
    ) -> None:
        """Take what one call of ``graph`` measured."""

    def follow(self, outputs: Sequence[object]) -> None:
        """Take the outputs of one call of a graph, from which a backward pass may come back."""

    def gradient_rows(
        self, graph: MeasuredGraph, inputs: Sequence[object], wanted: RowInput
    ) -> torch.Tensor:
        """An extra input of one call of ``graph``, whose gradient will hold rows."""

    @property
    def is_bearing(self) -> bool:
        """Whether a fault of the monitoring may cost a step its rows, but not end it."""

    def bear(self, error: Exception) -> None:
        """Let the step, in which a graph runs unmeasured, go on without a record."""


@dataclass(frozen=True)
class Witness:
    """A parameter among a graph's inputs: it tells which of several equal modules is running."""

    input: int
    parameter: str


@dataclass(frozen=True)
class GraphReport:
    """A rewritten graph as ``tmm.explain`` shows it.

    ``before`` and ``after`` are its nodes, ``code`` Python that runs by itself, ``bytes`` the size
    of the extra outputs for the batch that was traced, ``seconds`` the time of each pass,
    ``ended_by`` where and why a graph break ended it (empty where none did), ``readings`` how many
    elements each tensor has that is read once more, ``lowerings`` how rows are computed that the
    compiler might fuse.
    """

    owner: str
    settings: str
    before: tuple[NodeLine, ...]
    after: tuple[NodeLine, ...]
    code: str
    rows: int
    outputs: int
    bytes: int
    seconds: dict[str, float]
    ended_by: str = ""
    index: int = 0
    readings: tuple[int, ...] = ()
    lowerings: tuple[Lowered, ...] = ()

    @property
    def diff(self) -> str:
        """A unified diff of the nodes before and after; inserted ones name pass and site."""
        before, after = (list(map(str, nodes)) for nodes in (self.before, self.after))
        names = (f"graph {self.index}, traced", f"graph {self.index}, measured")
        return "\n".join(difflib.unified_diff(before, after, *names, lineterm="", n=2))


class MeasuredGraph:
    """A compiled, rewritten graph: gives back the outputs of the original one, keeps the rest."""

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        rewritten: Rewritten,
        report: GraphReport,
        owner: torch.nn.Module,
        witness: Witness | None,
        host: Host,
        *,
        examples: Sequence[object],
        has_own_randomness: bool,
        loses_reference: bool,
        is_evaluation: bool = False,
    ) -> None:
        self.run = run
        self.examples = examples
        self.layout = rewritten.layout
        self.row_inputs = rewritten.row_inputs
        self.reference = rewritten.reference
        self.placed_ends = rewritten.placed_ends
        self.has_own_randomness = has_own_randomness
        self.loses_reference = loses_reference
        self.is_evaluation = is_evaluation
        self.report = report
        self.owner = owner
        self.witness = witness
        self.host = host

    def __call__(self, *inputs: object) -> Sequence[Any]:
        """Run the graph."""
        if FakeTensor in map(type, inputs):
            # DistributedDataParallel's buckets: how the outputs will lie in memory is found out.
            outputs = self.run(*inputs, *self.examples)
            return outputs[: len(outputs) - self.layout.outputs - self.reference.added]
        self.examples = ()
        comparing = self.host.comparing
        counterparts: Sequence[torch.Tensor] = ()
        if comparing is not None:
            counterparts = comparing.counterparts(self.reference, inputs, self.host.frame)
        rows = [self.host.gradient_rows(self, inputs, wanted) for wanted in self.row_inputs]
        with nullcontext() if comparing is None else comparing.inside_graph():
            outputs = self.run(*inputs, *counterparts, *rows)
        extra, added = self.layout.outputs, self.reference.added
        own = len(outputs) - extra - added
        if comparing is not None:
            comparing.take(self.reference, inputs, outputs[:own], outputs[own : own + added])
            if self.loses_reference:
                comparing.end(LOST_ITEMS)
        self.host.collect(self, inputs, outputs[len(outputs) - extra :])
        self.host.follow(outputs[:own])
        if self.placed_ends.hold_for(inputs):
            self.placed_ends.note(tuple(outputs[:own]))
        return outputs[:own]

    def outside(self, measurement: Measurement) -> bool:
        """Whether the site lies outside of the module whose frame was traced."""
        return measurement.site.module.startswith(OUTSIDE)


class Handle:
    """Calls something, until it is let go of.

    Dynamo keeps what it was given, and copies of its ``__dict__``, for as long as the process runs.
    A handle has none, and does not keep what it calls alive, so that models and compiled programs
    need not live as long.
    """

    __slots__ = ("__weakref__", "_called")

    def __init__(self, called: Callable[..., Any]) -> None:
        kind = weakref.WeakMethod if inspect.ismethod(called) else weakref.ref
        self._called: Callable[[], Callable[..., Any] | None] = kind(called)

    def __call__(self, *arguments: Any) -> Any:
        """Call what is there yet."""
        called = self._called()
        assert called is not None, "it was let go of"
        return called(*arguments)

    def let_go(self) -> None:
        """Call nothing from now on."""
        self._called = _nothing


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
        tensors = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if tensors and all(x.is_cpu for x in tensors):
            start_compiling(*HOST_SOURCES)
            if scope.attention is not None:
                start_compiling(*ATTENTION_SOURCES)
        comparison = samples = None
        comparing, whole = self.host.comparing, scope.is_root and whole
        if scope.comparison is not None and comparing is not None:
            refusal = ""
            if not whole and not self._is_followed(module, comparing):
                refusal = LOST_ITEMS
            elif self.sampling is not None:
                samples = self.sampling.samples(module, comparing.batch)
            is_part = samples is None and (not whole or comparing.inputs.are_traced)
            parameter = partial(_id_of_held, comparing.reference)
            stays = partial(_counterpart_stays, comparing.reference)
            asked = scope.comparison
            comparison = ComparisonRequest(
                *(asked.select, asked.check, parameter, is_part, samples, refusal, stays)
            )
        request = GraphRequest(
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
            writes_in_place=self.settings.uses_inductor,
            fuses=self.settings.uses_inductor and self.host.lowering != "operator",
            lowering=self.host.lowering,
        )
        index = len(self.host.graphs)
        notes, subject = self.host.notes, f"graph {index}, of {scope.owner_name}"
        watch = None
        if (trace := self.host.trace) is not None:
            folder = f"{trace.path}, {subject}"
            begun = notes.attempt(folder, lambda: trace.begin(index, module, scope.modules), None)
            watch = None if begun is None else notes.guarded(folder, begun)
        if request.fuses:
            register_lowerings()
        rewritten = rewrite(module, request, watch=watch)
        if rewritten.evaluations:
            self.host.leave_out_evaluations(rewritten.evaluations)
        if samples is not None:
            assert self.sampling is not None
            assert comparing is not None
            assert comparing.batch is not None
            with comparing.inside_graph():
                self.sampling.check(rewritten, samples, comparing.batch)
            self.sampling.settle(module, samples, comparing.batch)
        self.host.leave_out(scope.owner, rewritten.layout.unmeasured)
        report = GraphReport(
            owner=scope.owner_name,
            settings=notes.attempt(subject, partial(str, self.settings), ""),
            before=notes.attempt(subject, lambda: tuple(node_lines(module, scope.modules)), ()),
            after=notes.attempt(
                subject, lambda: tuple(node_lines(rewritten.module, scope.modules)), ()
            ),
            code=notes.attempt(subject, partial(runnable_code, rewritten.module), ""),
            rows=len(rewritten.layout.slots)
            + sum(len(row_input.layout.slots) for row_input in rewritten.row_inputs),
            outputs=rewritten.layout.outputs,
            bytes=notes.attempt(subject, partial(_extra_bytes, rewritten), 0),
            seconds=rewritten.seconds,
            ended_by=notes.attempt(subject, partial(end_of_graph, module), ""),
            index=index,
            readings=readings(rewritten.module),
            lowerings=rewritten.lowerings,
        )
        witness = _find_witness(module, scope.owner)
        added = list(rewritten.module.graph.find_nodes(op="placeholder"))[len(inputs) :]
        examples = [value_of(node) for node in added]
        # Compiled graphs are cached only if they call nothing but what is marked as cacheable.
        known = inductor_config().unsafe_marked_cacheable_functions
        ours = {probe: PROBE_VERSION, parts_of_multi_head: MULTI_HEAD_VERSION}
        ours |= {spread_rows: PROBE_VERSION, merge_parts: MERGE_VERSION}
        ours |= dict.fromkeys((*MASKED, *MASKED.values()), MASKED_VERSION)
        cacheable = {f"{f.__module__}.{f.__name__}": version for f, version in ours.items()} | known
        notes.attempt(subject, partial(compile_kernels, rewritten.module), None)
        settings = {"unsafe_marked_cacheable_functions": cacheable}
        if self.settings.uses_inductor:
            settings |= _partitioned_as_unmeasured()
        with inductor_config().patch(settings):
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


def _partitioned_as_unmeasured() -> dict[str, object]:
    """Settings of Inductor that have it keep what it would for the backward pass; see the pass."""
    name = "custom_partitioner_fn"
    users = getattr(inductor_config(), name, ...)
    if users is ...:
        return {}  # a torch without them
    from tmm.core.partitioner_private import ChangedPartitioner

    return {name: ChangedPartitioner(hide_measuring, show_measuring, HIDING_VERSION, users)}


def _nothing() -> None:
    return None


def _extra_bytes(rewritten: Rewritten) -> int:
    count = rewritten.layout.outputs
    (returned,) = rewritten.module.graph.output_node().args
    assert isinstance(returned, (tuple, list))
    extra = [node for node in returned[len(returned) - count :] if isinstance(node, Node)]
    return sum(_hinted_bytes(value_of(node)) for node in extra)


def _hinted_bytes(example: torch.Tensor) -> int:
    return hinted_elements(example) * example.element_size()


def _find_witness(module: GraphModule, owner: torch.nn.Module) -> Witness | None:
    names = {id(parameter): name for name, parameter in owner.named_parameters()}
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        argument = argument_of(node)
        if argument is not None and id(argument.example) in names:
            return Witness(index, names[id(argument.example)])
    return None
