"""What a model calls in place of the user's compiled programs while it is looked at."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from tmm.core.dynamo_private import OptimizedModule, innermost_fn
from tmm.core.module_names import unwrapped, wrapped_module
from tmm.core.replacement import Replacement
from tmm.instrumentation.compile_settings import CompileSettings, settings_of
from tmm.instrumentation.regions import (
    COMPILED_CALL,
    Region,
    behind_switches,
    region_of,
    regions_in,
)
from tmm.instrumentation.switch import Switch, root_switch
from tmm.nonfinite.graphs import Tracer


@dataclass(frozen=True, eq=False)
class Program:
    """What the user gave: a module or a step function.

    ``callee`` is what runs, without the wrappers of ``torch.compile`` and of data-parallel
    training; with ``settings`` it is compiled as a whole. ``roots`` are the modules that are
    known to run, by name, ``regions`` their parts that are compiled on their own, ``switches``
    those of their monitors, and ``parallel`` the parts that exchange gradients with other
    processes.
    """

    callee: Callable[..., Any]
    settings: CompileSettings | None
    roots: Mapping[str, torch.nn.Module]
    regions: tuple[Region, ...]
    switches: tuple[Switch, ...]
    parallel: tuple[DistributedDataParallel, ...]

    @property
    def is_compiled(self) -> bool:
        """Whether any part of it is compiled."""
        return self.settings is not None or any(region.settings for region in self.regions)

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether a run of the user's program overwrites the outputs of the one before."""
        compiled = [self.settings, *(region.settings for region in self.regions)]
        return any(settings.uses_cuda_graphs for settings in compiled if settings is not None)


def program_of(model: object, module: torch.nn.Module | None) -> Program:
    """What ``model`` runs.

    Raises ``TypeError`` for what is neither a module nor a function, ``ValueError`` for
    ``module=`` with a module.
    """
    if isinstance(model, torch.nn.Module):
        if module is not None:
            raise ValueError(
                "module= goes with a step function; of a module, its own parts are named: write"
                " tmm.find_nonfinite(model, batch)"
            )
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError("model= is a ScriptModule, which cannot be looked into")
        callee, settings = _without_wrappers(model)
        roots, regions = {"": unwrapped(callee)}, tuple(regions_in(callee))
        found = _switches(model), _parallel(model)
        return Program(callee, settings, roots, regions, *found)
    if not callable(model):
        raise TypeError(f"model={model!r} is neither a module nor a function")
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"module={module!r} is not a torch.nn.Module")
    switch = root_switch(model)
    compiled = behind_switches(model) if switch is None else switch.original
    assert callable(compiled)
    function = innermost_fn(compiled)
    used = modules_of(function)
    if module is not None:
        used = {"": module, **used}
    regions = tuple(region for root in used.values() for region in regions_in(root))
    found = _switches(model, *used.values()), _parallel(*used.values())
    settings = settings_of(compiled)
    if module is not None:
        return Program(function, settings, {"": unwrapped(module)}, regions, *found)
    with_state = {name: m for name, m in used.items() if any(True for _ in m.parameters())}
    names = {unwrapped(root): name for name, root in reversed((with_state or used).items())}
    roots = {name: root for root, name in reversed(names.items())}
    return Program(function, settings, roots, regions, *found)


def _content(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty yet
        return None


def _parallel(*models: torch.nn.Module) -> tuple[DistributedDataParallel, ...]:
    parts = (part for model in models for part in model.modules())
    return tuple(part for part in parts if isinstance(part, DistributedDataParallel))


def _switches(*models: object) -> tuple[Switch, ...]:
    found = [root_switch(model) for model in models]
    return tuple(dict.fromkeys(switch for switch in found if switch is not None))


def modules_of(function: object) -> dict[str, torch.nn.Module]:
    """The modules that a function refers to: of its closure, its globals, and its own object."""
    if isinstance(function, types.MethodType):
        owner = function.__self__
        inner = modules_of(function.__func__)
        return {"": owner, **inner} if isinstance(owner, torch.nn.Module) else inner
    if not isinstance(function, types.FunctionType):
        return {}
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    names = {name: function.__globals__.get(name) for name in function.__code__.co_names}
    named = names | {name: _content(cell) for name, cell in cells}
    modules = {name: m for name, m in named.items() if isinstance(m, torch.nn.Module)}
    return {name: m for name, m in modules.items() if not _is_inside(m, modules)}


@contextmanager
def replaced(program: Program, tracer: Tracer | None) -> Iterator[Callable[..., Any]]:
    """Within the block, compiled parts run as graphs of ``tracer``, without it eagerly.

    Gives what is to be called in place of the program.
    """
    swaps = _Swaps(program, tracer)
    try:
        swaps.show(inside=False)
        with torch.compiler.set_stance("force_eager"):
            if program.settings is None or tracer is None:
                yield program.callee
            else:
                yield swaps.runner(program.callee, program.settings)
    finally:
        swaps.restore()


class _Swaps:
    """Attributes of modules that hold compiled programs, and what stands there meanwhile.

    Inside of one of our programs, the parts of it are called as they are: they are traced with it.
    """

    def __init__(self, program: Program, tracer: Tracer | None) -> None:
        self._tracer = tracer
        self._inside: dict[tuple[torch.nn.Module, str], object] = {}
        self._outside: dict[tuple[torch.nn.Module, str], object] = {}
        for root in program.roots.values():
            for module in root.modules():
                if module.__dict__.get(COMPILED_CALL) is not None:
                    self._inside[module, COMPILED_CALL] = None  # a monitor, perhaps
        for region in program.regions:
            if region.holder is None:
                continue
            key = region.holder, region.attribute
            self._inside[key] = None if region.attribute == COMPILED_CALL else region.callee
            if tracer is not None and region.settings is not None:
                self._outside[key] = self.runner(region.callee, region.settings)
        self._calls = {key: Replacement(*key) for key in (*self._inside, *self._outside)}

    def runner(self, callee: Callable[..., Any], settings: CompileSettings) -> Callable[..., Any]:
        """Runs ``callee`` as our program."""
        assert self._tracer is not None
        compiled = self._tracer.program(callee, settings)

        def run(*args: Any, **kwargs: Any) -> Any:
            self.show(inside=True)
            try:
                with torch.compiler.set_stance("default"):
                    return compiled(callee, *args, **kwargs)
            finally:
                self.show(inside=False)

        return run

    def show(self, *, inside: bool) -> None:
        """Put in place what is called inside of our programs, or outside of them."""
        for key, value in self._inside.items():
            self._calls[key].put(value if inside else self._outside.get(key, value))

    def restore(self) -> None:
        for call in self._calls.values():
            call.restore()


def _without_wrappers(
    model: torch.nn.Module,
) -> tuple[torch.nn.Module, CompileSettings | None]:
    """The module that a user's wrappers call, and how it is compiled as a whole."""
    settings = None
    while True:
        is_compiled = isinstance(model, OptimizedModule)
        parallel = (torch.nn.DataParallel, DistributedDataParallel)
        if not is_compiled and not isinstance(model, parallel):
            return model, settings
        if is_compiled:
            region = region_of(model)
            settings = settings if region is None else region.settings
        inner = wrapped_module(model)
        assert inner is not None
        model = inner


def _is_inside(module: torch.nn.Module, others: Mapping[str, torch.nn.Module]) -> bool:
    inner = unwrapped(module)
    return any(
        inner is not unwrapped(other) and any(inner is child for child in other.modules())
        for other in others.values()
    )
