"""The monitored program of a model: traced from the same module, run on monitored steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch._dynamo.callback import CallbackArgs, CallbackTrigger, callback_handler
from torch._dynamo.types import GuardFilterEntry

from tmm.backend import OUTSIDE, MeasuredGraph, MeasuringBackend, Scope
from tmm.compile_settings import CompileSettings, compile_separately
from tmm.layout import Measurement, Site
from tmm.metrics import Reduction
from tmm.naming import display_name, relative_names
from tmm.operators import why_unmeasurable
from tmm.outputs import mark_nothing, mark_outputs, tensors_in
from tmm.runtime.binding import Binding, KeyRegistry, single_row
from tmm.runtime.eager import reduce_eagerly
from tmm.spec import Plan

_HOOK_KEY = -1  # torch numbers its own hooks from 0; inserted last, so it runs after them

_HOOK_DICTS = ("._forward_hooks", "._forward_pre_hooks")

_running: ContextVar[Twin | None] = ContextVar("tmm_running_twin", default=None)


class Recorder(Protocol):
    """Takes what a twin measures; a ``Monitor``."""

    registry: KeyRegistry

    def add(self, binding: Binding, outputs: Sequence[torch.Tensor]) -> None:
        """Take the extra outputs of one call of a graph."""


def _traced(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return module(*args, **kwargs)


class Twin:
    """Runs a module with its measurements.

    While Dynamo traces, every module carries a hook that marks its outputs in the graph. While the
    program runs, modules that no graph holds (after graph breaks) carry hooks that measure them
    eagerly and tell which module the running frame belongs to. Outside of both, no hook exists.
    """

    def __init__(
        self, module: torch.nn.Module, plan: Plan, settings: CompileSettings, recorder: Recorder
    ) -> None:
        self.module = module
        self.plan = plan
        self.recorder = recorder
        self.backend = MeasuringBackend(self, settings)
        self.names = relative_names(module)
        self.eager_modules: set[torch.nn.Module] = set()
        self.unmeasured: dict[str, str] = {}
        self._program = compile_separately(_traced, settings, self.backend, _keep_guards)
        self._tracing = False
        self._frames: list[torch.nn.Module] = []
        self._eager_bindings: dict[tuple[Site, Reduction], Binding] = {}
        self._bindings: dict[tuple[int, torch.nn.Module], Binding | None] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module's forward, measured."""
        with self._hooked():
            return self._program(self.module, *args, **kwargs)

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        outer = _running.set(self)
        frames, self._frames = self._frames, [self.module]
        self._hook_eagerly()
        callback_handler.register_start_callback(self._start_tracing)
        callback_handler.register_end_callback(self._end_tracing)
        try:
            yield
        finally:
            callback_handler.remove_start_callback(self._start_tracing)
            callback_handler.remove_end_callback(self._end_tracing)
            self._unhook()
            self._frames = frames
            _running.reset(outer)

    def _start_tracing(self, compilation: CallbackArgs) -> None:
        if compilation.callback_trigger is CallbackTrigger.DYNAMO and _running.get() is self:
            self._tracing = True
            self._unhook()  # of the modules known so far: there may be others now
            self.names = relative_names(self.module)
            for module in self.names:
                module._forward_hooks[_HOOK_KEY] = mark_outputs
                if module._forward_pre_hooks:
                    # The user's hooks are guarded on, with the length of the dict that holds them.
                    module._forward_pre_hooks[_HOOK_KEY] = mark_nothing

    def _end_tracing(self, compilation: CallbackArgs) -> None:
        if self._tracing and _running.get() is self:
            self._tracing = False
            self._hook_eagerly()

    def _hook_eagerly(self) -> None:
        # All of them: any frame may come to run eagerly, as when Dynamo's recompile limit is hit.
        for module in self.names:
            module._forward_pre_hooks[_HOOK_KEY] = self._enter_module
            module._forward_hooks[_HOOK_KEY] = self._leave_module

    def _unhook(self) -> None:
        for module in self.names:
            module._forward_pre_hooks.pop(_HOOK_KEY, None)
            module._forward_hooks.pop(_HOOK_KEY, None)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _enter_module(self, module: torch.nn.Module, arguments: object) -> None:
        self._frames.append(module)

    @torch._dynamo.disable  # type: ignore[untyped-decorator]
    def _leave_module(self, module: torch.nn.Module, arguments: object, output: object) -> None:
        if module in self._frames[1:]:
            while self._frames.pop() is not module:
                pass  # a module that was left by an exception is still on the stack
        self.eager_modules.add(module)
        name = display_name(self.names[module])
        for path, tensor in tensors_in(output):
            self._measure_eagerly(Site(name, path), tensor.detach())

    def _measure_eagerly(self, site: Site, tensor: torch.Tensor) -> None:
        reductions = self.plan.select(site.module, tensor.dtype)
        if reductions and (reason := why_unmeasurable(tensor)):
            self.unmeasured[site.module + site.path] = reason
            return
        values = tensor.values() if tensor.is_nested else tensor
        for reduction in reductions:
            key = (site, reduction)
            if key not in self._eager_bindings:
                layout = single_row(Measurement("activation", site, reduction))
                self._eager_bindings[key] = self.recorder.registry.bind(layout, _site_key)
            self.recorder.add(self._eager_bindings[key], [reduce_eagerly(values, reduction)])

    def scope(self) -> Scope:
        """The scope of the frame that Dynamo is compiling now."""
        if not self._tracing:
            raise RuntimeError(
                "a graph was traced while another thread was compiling, so that its modules could"
                " not be marked"
            )
        owner = self._frames[-1]
        modules = {id(module): OUTSIDE + name for module, name in self.names.items()}
        modules |= {id(module): name for module, name in relative_names(owner).items()}
        # Equal modules may come to share the graph: it measures what any of them asks for.
        peers = [module for module in self.names if type(module) is type(owner)]
        resolvers = [self._resolver(peer) for peer in peers]

        def select(relative: str, dtype: torch.dtype) -> tuple[Reduction, ...]:
            names = [name for resolve in resolvers if (name := resolve(relative)) is not None]
            selected = [r for name in names for r in self.plan.select(name, dtype)]
            return tuple(dict.fromkeys(selected))

        return Scope(owner, modules, select)

    def leave_out(self, owner: torch.nn.Module, unmeasured: tuple[tuple[Site, str], ...]) -> None:
        """Remember which sites of a frame of ``owner`` have no rows, and why."""
        resolve = self._resolver(owner)
        for site, reason in unmeasured:
            self.unmeasured[(resolve(site.module) or site.module) + site.path] = reason

    def collect(
        self, graph: MeasuredGraph, inputs: Sequence[object], extra: Sequence[torch.Tensor]
    ) -> None:
        """Credit the rows of one call of ``graph`` to the module whose frame is running."""
        owner = self._owner(graph, inputs)
        if owner is None:
            self.unmeasured[f"a {type(graph.owner).__name__}"] = "it is not known which one ran"
            return
        key = (id(graph), owner)
        if key not in self._bindings:
            self._bindings[key] = self._bind(graph, owner)
        binding = self._bindings[key]
        if binding is not None:
            self.recorder.add(binding, extra)

    def _resolver(self, owner: torch.nn.Module) -> Callable[[str], str | None]:
        """From names relative to ``owner`` to those in keys: a shared module has its first name."""
        modules = {name: module for module, name in relative_names(owner).items()}

        def resolve(name: str) -> str | None:
            if name.startswith(OUTSIDE):
                return display_name(name.removeprefix(OUTSIDE))
            module = modules.get(name)
            return None if module not in self.names else display_name(self.names[module])

        return resolve

    def _owner(self, graph: MeasuredGraph, inputs: Sequence[object]) -> torch.nn.Module | None:
        """The module whose frame is running: the innermost called one, as parameters confirm."""
        owner = self._frames[-1]
        if graph.witness is None or owner is graph.owner is self.module:
            return owner
        parameter = inputs[graph.witness.input]
        for candidate in (owner, *reversed(self._frames), *self.names):
            if (
                type(candidate) is type(graph.owner)
                and _parameter(candidate, graph.witness.parameter) is parameter
            ):
                return candidate
        return owner if owner is graph.owner else None

    def _bind(self, graph: MeasuredGraph, owner: torch.nn.Module) -> Binding | None:
        if type(owner) is not type(graph.owner):
            self.unmeasured[display_name(self.names.get(owner, type(owner).__name__))] = (
                f"ran a graph of a {type(graph.owner).__name__}"
            )
            return None
        absolute = self._resolver(owner)

        def resolve(measurement: Measurement) -> str | None:
            name = absolute(measurement.site.module)
            if name is None or (graph.outside(measurement) and owner is not graph.owner):
                return None
            wanted = [*self.plan.select(name, torch.float32)]
            wanted += self.plan.select(name, torch.complex64)
            return name + measurement.site.path if measurement.reduction in wanted else None

        self.leave_out(owner, graph.layout.unmeasured)
        return self.recorder.registry.bind(graph.layout, resolve)


def _site_key(measurement: Measurement) -> str:
    return measurement.site.module + measurement.site.path


def _parameter(module: torch.nn.Module, name: str) -> torch.nn.Parameter | None:
    try:
        return module.get_parameter(name)
    except AttributeError:
        return None


def _keep_guards(entries: Sequence[GuardFilterEntry]) -> list[bool]:
    """Drop the guards on hooks: ours are there while tracing and gone when the guard is checked."""
    return [not (_is_hook_guard(entry)) for entry in entries]


def _is_hook_guard(entry: GuardFilterEntry) -> bool:
    ours = entry.value is mark_outputs or entry.value is mark_nothing
    return ours or entry.name.endswith(_HOOK_DICTS)
