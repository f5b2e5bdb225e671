"""The monitored program of a model: traced from the same modules, run on monitored steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from tmm.core.dynamo_private import (
    BackendCompilerFailed,
    CallbackArgs,
    CallbackTrigger,
    InternalTorchDynamoError,
    callback_handler,
)
from tmm.core.failures import warn
from tmm.core.families import BRANCH_FAMILIES
from tmm.core.module_names import unwrapped
from tmm.core.recorded_values import RecordError
from tmm.core.records import Measurement, Site
from tmm.core.replacement import Replacement
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.eager_backend import EagerAnswers
from tmm.instrumentation.eager_rows import EagerRows
from tmm.instrumentation.foreign import PASSED_BY
from tmm.instrumentation.frozen_values import FrozenValues
from tmm.instrumentation.gradient_hooks import GradientHooks
from tmm.instrumentation.graph_breaks import GraphBreaks
from tmm.instrumentation.handing_over import HandingOver
from tmm.instrumentation.held_by_graphs import HeldByGraphs
from tmm.instrumentation.measured_graph import MeasuredGraph
from tmm.instrumentation.module_hooks import ModuleHooks
from tmm.instrumentation.notes import Notes
from tmm.instrumentation.outside import OutsideCalls
from tmm.instrumentation.pass_trace import TraceFolder
from tmm.instrumentation.recorder import Recorder
from tmm.instrumentation.reference.comparison import Comparing
from tmm.instrumentation.region_programs import RegionPrograms, own_forward, runs_hooks_outside
from tmm.instrumentation.regions import COMPILED_CALL, Region
from tmm.instrumentation.scope import Scope
from tmm.instrumentation.untraced import Untraced
from tmm.kernels.dropped_rows import rows_dropped
from tmm.kernels.fused.choose_lowering import Lowering
from tmm.passes.findings import RowInput
from tmm.passes.metrics.gradient_rows import FAMILY as GRADIENT
from tmm.passes.metrics.trace import MetricFunctionError
from tmm.passes.reference.prefix_branch import SamplesError
from tmm.spec.reference import Reference

_running: ContextVar[Twin | None] = ContextVar("tmm_running_twin", default=None)


def running_twin() -> Twin | None:
    """The twin whose forward pass is running in this context."""
    return _running.get()


class Twin:
    """Runs a model with its measurements.

    ``root`` is what the user calls; ``regions`` are the parts of it that are compiled on their
    own. Regions of one class with equal settings share one program, hence its graphs.

    While Dynamo traces, every module carries a hook that marks its outputs in the graph. While
    the program runs, modules that no graph is known to hold carry hooks that measure them, and
    tell which module the running frame belongs to. Outside of both, no hook exists.

    Where no region is to be traced there is no second program: the user's own one runs, and
    ``untraced`` measures it. ``own_programs`` are those of the regions. ``lowering`` says what the
    compiler is to fuse.
    """

    def __init__(
        self,
        root: Region,
        regions: Sequence[Region],
        module: torch.nn.Module,
        attribution: Attribution,
        recorder: Recorder,
        trace: TraceFolder | None = None,
        lowering: Lowering = "auto",
    ) -> None:
        self.root = root
        self.regions = tuple(regions)
        self.module = module
        self.attribution = attribution
        self.plan = plan = attribution.plan
        self.recorder = recorder
        self.trace = trace
        self.lowering: Lowering = lowering
        self.comparing: Comparing | None = None
        self.breaks = GraphBreaks()
        self.notes = Notes()
        self.graphs: list[MeasuredGraph] = []
        self.eager_modules: dict[torch.nn.Module, torch.nn.Module] = {}
        self.asks_as_eager = any(
            region.settings is not None and region.settings.traced_for
            for region in (root, *regions)
        )
        self._answers = EagerAnswers()
        self.own_programs: dict[Region, Callable[..., Any]] = {}
        self.untraced: Untraced | None = None
        compares = any(map(plan.spec.measures, BRANCH_FAMILIES))
        if not compares and all(region.settings is None for region in (root, *regions)):
            self.untraced = Untraced(
                *(self.attribution, recorder, self.is_running),
                is_step_function=root.module is None,
            )
        self._programs = RegionPrograms(self, plan.spec.reference_samples)
        self._frames: list[torch.nn.Module] = []
        self._entering: torch.nn.Module | None = None
        self._tracing = False
        self._in_program = False
        self._function_depth = 0  # frames of a step function that is running, and outside of it
        self._evaluations = 0
        self._discarding = False
        self._is_unrecorded = False
        self._frozen = FrozenValues(plan.spec.rules)
        self._held = HeldByGraphs()
        self._handing_over = HandingOver(attribution, recorder)
        self._gradients = GradientHooks(
            *(attribution, recorder, self._handing_over, lambda: self._discarding)
        )
        self.eager_rows = EagerRows(
            *(attribution, recorder, self._handing_over, lambda: self._is_discarding, self._watched)
        )
        self.outside = OutsideCalls(
            *((root, *regions), attribution, recorder, self.eager_rows, self._gradients),
            is_running=lambda: running_twin() is not None,
            compares=lambda: self.comparing is not None,
            note=self._note_outside,
        )
        self._hooks = ModuleHooks(
            *(self.attribution, self._enter_module, self._leave_module),
            marks_inputs=plan.spec.measures("rcc"),
            spares_fused_layers=self.asks_as_eager,
        )

    # Running

    def run(self, region: Region, *args: Any, **kwargs: Any) -> Any:
        """Run a region, measured."""
        if self.is_running():
            if not self._is_in_function():
                return self._run(region, *args, **kwargs)
            self.recorder.begin_pass(region.module, (args, kwargs))
            output = self._run(region, *args, **kwargs)
            self.recorder.end_pass(output)
            return output
        comparing = self.comparing
        if comparing is not None and region.callee in (self.attribution.root, self.root.callee):
            module = region.module
            forward = region.callee if module is None else unwrapped(module).forward
            comparing.inputs.match(forward, args, kwargs)
            if comparing.inputs.pairs and not comparing.inputs.are_traced:
                comparing.inputs.are_traced = True
                self.close()  # the graphs have no place for inputs of the reference
        if self._frozen:
            self._renew_frozen()
        # A function may hold the backward passes of others, whose rows count.
        drops_rows = self._is_unrecorded and region.module is not None
        try:
            with (
                self._hooked(),
                rows_dropped(drops_rows),
                comparing.forward((args, kwargs)) if comparing else nullcontext(),
            ):
                return self._run(region, *args, **kwargs)
        finally:
            if self._frozen:
                self._frozen.note()

    def _renew_frozen(self) -> None:
        """Trace anew what holds numbers that are others by now."""
        if not self.graphs:
            self._frozen.note()
        elif not self._discarding and (changes := self._frozen.changes()):
            self.close()
            if not self._frozen.is_told:
                self._frozen.is_told = True
                warn(
                    f"{changes}. A graph holds such values as constants, so that the monitored"
                    " program is compiled anew at each change. tmm.activation(..., trace=False)"
                    " calls its function eagerly instead"
                )

    def watch(
        self, untraced: Untraced, region: Region, *args: Any, **kwargs: Any
    ) -> tuple[Any, Exception | None]:
        """Run the user's own program of a region, measured; what it gives, and our own fault."""
        outer = _running.set(self)
        try:
            is_function = region.module is None
            with untraced.forward(
                is_measured=not self._discarding, is_function=is_function
            ) as measured:
                output = self.own_programs[region](*args, **kwargs)
                if region.module is not None and region.attribute == COMPILED_CALL:
                    untraced.leave(region.module, output)  # the call itself was seen by nobody
                untraced.uncalled.look_through(output)
        finally:
            _running.reset(outer)
        return output, measured.fault

    def rest(self) -> None:
        """Leave the model alone until the next step."""
        if self.untraced is not None:
            self.untraced.rest()
        if self.comparing is not None:
            self.comparing.reference.release()

    def repeat(self, region: Region, *args: Any, **kwargs: Any) -> Any:
        """Run a region as in a monitored step, but measure nothing."""
        discarding, self._discarding = self._discarding, True
        try:
            if self.untraced is not None:
                output, fault = self.watch(self.untraced, region, *args, **kwargs)
                if fault is not None:
                    raise fault
                return output
            return self.run(region, *args, **kwargs)
        finally:
            self._discarding = discarding

    def run_unrecorded(self, region: Region, *args: Any, **kwargs: Any) -> Any:
        """Run a region in a step that is not monitored: its rows are dropped at once.

        Where a graph cannot be measured, it runs as it was traced.
        """
        self._is_unrecorded = True
        try:
            return self.repeat(region, *args, **kwargs)
        finally:
            self._is_unrecorded = False

    @contextmanager
    def set_aside(self, region: Region, foreign: str) -> Iterator[None]:
        """Let the user's program run inside of a forward pass of the twin, which is ``foreign``."""
        name = self.attribution.name(self.frame if region.module is None else region.module)
        self.attribution.unmeasured[f"{name}, under {foreign}"] = PASSED_BY
        outer = _running.set(None)
        self._hooks.remove()
        try:
            yield
        finally:
            self._hooks.watch()
            _running.reset(outer)

    def is_running(self) -> bool:
        """Whether a forward pass of this twin is under way in this context."""
        return _running.get() is self

    @property
    def is_whole(self) -> bool:
        """Whether all that ran so far ran inside of graphs, none of which a break has ended."""
        is_broken = any(graph.report.ended_by for graph in self.graphs)
        return bool(self.graphs) and not is_broken and not self.eager_modules

    @property
    def is_tracing(self) -> bool:
        """Whether one of our programs is being traced."""
        return self._tracing

    def is_entering(self, region: Region) -> bool:
        """Whether the program of ``region`` has just called its module: once only."""
        entering = region.module is not None and self._entering is region.module
        if entering:
            self._entering = None
        return entering

    def _run(self, region: Region, *args: Any, **kwargs: Any) -> Any:
        module = region.module
        depth, entering, in_program = len(self._frames), self._entering, self._in_program
        function_depth = self._function_depth
        self._frames.append(unwrapped(self.module if module is None else module))
        if module is None:
            self._function_depth = len(self._frames)
        try:
            self._in_program = region.settings is not None
            if not self._in_program:
                call = region.callee if module is None else module._call_impl
                return call(*args, **kwargs)
            if module is not None and runs_hooks_outside(region, module):
                return self._run_between_hooks(region, module, *args, **kwargs)
            self._entering = module
            return self._programs.of(region)(region.callee, *args, **kwargs)
        except (BackendCompilerFailed, InternalTorchDynamoError) as error:
            if (fault := _fault_of_the_user(error)) is not None:
                raise fault from None
            raise
        finally:
            self.breaks.note(self._frames[depth])
            del self._frames[depth:]
            self._entering, self._in_program = entering, in_program
            self._function_depth = function_depth

    def _run_between_hooks(
        self, region: Region, module: torch.nn.Module, *args: Any, **kwargs: Any
    ) -> Any:
        """Run hooks as they are, and what lies between them in graphs, as the user's program."""
        program = self._programs.of(region, is_traced=False)
        if region.entry == "call":
            self.breaks.add(module, "its hooks run outside of graphs, as without monitoring")
            return program(module._call_impl, *args, **kwargs)
        self.breaks.add(module, "its forward alone is compiled")
        forward = own_forward(module)
        with Replacement(module, "forward", partial(program, forward)):
            return module._call_impl(*args, **kwargs)

    def _held_by_graphs(self) -> frozenset[torch.nn.Module]:
        """Modules that need not be watched."""
        if self.comparing is not None:
            return frozenset()  # what is compared outside of graphs goes by the calls of modules
        whole = tuple(filter(self._programs.has_run_whole, (self.root, *self.regions)))
        return self._held.modules(self.attribution.names, whole, self.eager_modules)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        outer = _running.set(self)
        frames, self._frames = self._frames, [unwrapped(self.module)]
        self.breaks.skip()
        # Of a pass whose rows are dropped, what Dynamo traces alone needs to know whose frames run.
        if not (self._is_unrecorded and self.is_whole) or self._hooks.are_guarded:
            self._hooks.watch(self._held_by_graphs())
        callback_handler.register_start_callback(self._start_tracing)
        callback_handler.register_end_callback(self._end_tracing)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(self._start_tracing)
            callback_handler.remove_end_callback(self._end_tracing)
            self._answers.stop()
            self._hooks.remove()
            self._frames = frames
            _running.reset(outer)

    def compare_with(self, reference: Reference | None) -> None:
        """Compare with ``reference`` from now on, or with nothing; graphs are traced anew."""
        self.comparing = None
        if reference is not None:
            self.comparing = Comparing(
                *(reference, self.attribution, self._add_comparison, self._lose_comparison)
            )
        self.close()

    def close(self) -> None:
        """Let go of what was traced."""
        self._programs.close()
        if self.untraced is not None:
            self.untraced.close()
        self.graphs.clear()
        self._held.forget()

    # Tracing

    def _start_tracing(self, compilation: CallbackArgs) -> None:
        if compilation.callback_trigger is not CallbackTrigger.DYNAMO or not self.is_running():
            return
        if not self._programs.are_being_compiled(are_running=self._in_program):
            name = self.attribution.name(self._frames[-1])
            self.attribution.unmeasured[f"{name}, in a function that is compiled by itself"] = (
                "modules that such a function calls are measured only where Dynamo inlines it"
            )
            return
        self._tracing = True
        if self.asks_as_eager:
            self._answers.give()
        self._programs.kept.begin()
        self._hooks.mark()

    def _end_tracing(self, compilation: CallbackArgs) -> None:
        if compilation.callback_trigger is not CallbackTrigger.DYNAMO or not self.is_running():
            return
        if self._tracing:
            self._programs.kept.end()
            self.breaks.note(self._frames[-1])
        self._tracing = False
        self._answers.stop()
        self._hooks.watch()

    def scope(self) -> Scope:
        """The scope of the frame that Dynamo is compiling now."""
        if not self._tracing:
            raise RuntimeError(
                "a graph was traced while another thread was compiling, so that its modules could"
                " not be marked"
            )
        scope = self.attribution.scope(self._frames[-1], self.eager_rows.values.reductions)
        is_step_function = len(self._frames) == self._function_depth
        return replace(scope, is_step_function=True) if is_step_function else scope

    @property
    def is_bearing(self) -> bool:
        """Whether a fault of the monitoring may cost a step its rows, but not end it."""
        return self._is_unrecorded or self.recorder.is_bearing

    def bear(self, error: Exception) -> None:
        """Let the step, in which a graph runs unmeasured, go on without a record.

        Raises ``error`` instead until a first step has succeeded.
        """
        if not self._is_unrecorded:
            self.recorder.note_failure(error)

    def leave_out(self, owner: torch.nn.Module, unmeasured: tuple[tuple[Site, str], ...]) -> None:
        """Remember which sites of a frame of ``owner`` have no rows, and why."""
        self.attribution.leave_out(owner, unmeasured)

    def leave_out_evaluations(self, count: int) -> None:
        """Remember how many calls of the model a graph of a step function does not measure."""
        self._evaluations += count
        self.attribution.unmeasured["calls without gradients, in graphs of the step function"] = (
            f"{self._evaluations} are not measured, as others of the same modules have gradients"
        )

    # Calls between graphs

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _enter_module(
        self, module: torch.nn.Module, arguments: Any, keywords: Mapping[str, Any] | None = None
    ) -> None:
        if not self.is_running():
            return  # another thread calls the module meanwhile
        if self.comparing is not None and self.comparing.is_repeating:
            return
        if self._held.holds_parts_of(module):
            self._hooks.watch()  # Dynamo has left a region to Python
        if (inside := unwrapped(module)) is not module:
            self._frames.append(inside)  # the graphs that begin here are of what it wraps
            return
        if self._is_in_function():
            self.recorder.begin_pass(module, (arguments, keywords))
        self._frames.append(module)
        if self.comparing is not None:
            self.comparing.enter(module, arguments, keywords)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _leave_module(self, module: torch.nn.Module, arguments: object, output: object) -> None:
        if not self.is_running():
            return
        if self.comparing is not None and self.comparing.is_repeating:
            return
        inside = unwrapped(module)
        if inside in self._frames[1:]:
            while self._frames.pop() is not inside:
                pass  # a module that was left by an exception is still on the stack
        if inside is not module:
            return
        callers = (frame for frame in reversed(self._frames) if frame is not module)
        self.eager_modules[module] = next(callers, module)
        if not self._is_unrecorded:
            self.eager_rows.measure(module, output)
        if self.comparing is not None:
            self.comparing.leave(module, output)
        if self.plan.spec.measures(GRADIENT):
            self._gradients.probe(module, output)
        if self._is_in_function():
            self.recorder.end_pass(output)

    def _note_outside(self, module: torch.nn.Module) -> None:
        """A module was called past the forward of the model."""
        if self.untraced is not None:
            self.untraced.note_call(module)
        else:
            self.eager_modules.setdefault(module, unwrapped(self.module))

    def _is_in_function(self) -> bool:
        """Whether a step function is running, and no module that it calls."""
        return len(self._frames) == self._function_depth and not self._discarding

    # Measuring

    def follow(self, outputs: Sequence[object]) -> None:
        """Tell of the outputs of a graph that a step function has run."""
        if self._is_in_function():
            self.recorder.follow(outputs)

    def collect(
        self, graph: MeasuredGraph, inputs: Sequence[object], extra: Sequence[torch.Tensor]
    ) -> None:
        """Take the rows of one call of ``graph``."""
        if graph.has_own_randomness and self.comparing is not None:
            self.comparing.note_own_randomness()
        if not extra or self._is_unrecorded:
            return
        binding = self.attribution.bind(
            *(graph, graph.layout, inputs, self._frames),
            lost="" if self.comparing is None else self.comparing.lost,
        )
        if binding is None or self._discarding:
            return
        if not (graph.is_evaluation and self._is_in_function()):
            self._handing_over.give(self.recorder.add, binding, extra)
            return
        with torch.no_grad():  # as the calls in the graph, whatever holds around it
            self.recorder.begin_pass(None, ())
        self._handing_over.give(self.recorder.add, binding, extra)
        self.recorder.end_pass(())

    def gradient_rows(
        self, graph: MeasuredGraph, inputs: Sequence[object], wanted: RowInput
    ) -> torch.Tensor:
        """An extra input of one call of ``graph``; the gradient that it gets holds rows."""
        is_recorded = not self._is_unrecorded
        return self._gradients.rows(graph, inputs, wanted, self._frames, is_recorded=is_recorded)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def show(self, owner: torch.nn.Module | str, path: str, tensor: torch.Tensor) -> None:
        """Measure, and compare, a tensor that the program shows outside of graphs."""
        site = self.attribution.shown_site(owner, path)
        if self._is_discarding:
            return
        self.eager_rows.show(site, tensor)
        if self.comparing is not None and self.is_running():
            self.comparing.show(site, tensor)

    @property
    def frame(self) -> torch.nn.Module:
        """The module whose frame is running."""
        return self._frames[-1]

    @property
    def has_probes(self) -> bool:
        """Whether any graph measures gradients."""
        return any(graph.row_inputs for graph in self.graphs)

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients carry a scaler's factor that is to be taken out."""
        return self.recorder.scales_gradients

    def _watched(self) -> Untraced | None:
        """What measures the user's own program, if that runs in this context."""
        return self.untraced if self.is_running() else None

    @property
    def _is_discarding(self) -> bool:
        """Whether a forward pass, or a part of it, runs that is not to be measured."""
        repeats = self.comparing is not None and self.comparing.is_repeating
        return self._discarding or repeats

    def _add_comparison(self, measurement: Measurement, row: torch.Tensor) -> None:
        if not self._discarding:
            self.recorder.add(self.attribution.bind_eagerly(measurement), [row])

    def _lose_comparison(self, measurement: Measurement, reason: str) -> None:
        binding = self.attribution.lose(measurement, reason)
        if not self._discarding:
            self.recorder.add(binding, [])


def _fault_of_the_user(error: BaseException | None) -> Exception | None:
    """The message for the user that Dynamo wrapped in an error of its own, if it did."""
    while error is not None:
        if isinstance(error, (RecordError, MetricFunctionError, SamplesError)):
            return error
        error = error.__cause__ or error.__context__
    return None
