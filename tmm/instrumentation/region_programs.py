"""The monitored programs of a model's regions, and what Dynamo keeps of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

import torch

from tmm.core.dynamo_private import GuardFilterEntry, innermost_fn, isolation_id
from tmm.instrumentation.backend import MeasuringBackend
from tmm.instrumentation.compile_settings import HAS_ISOLATION, CompileSettings, compile_separately
from tmm.instrumentation.kept_by_dynamo import KeptByDynamo
from tmm.instrumentation.measured_graph import Host
from tmm.instrumentation.module_hooks import has_own_hooks, keep_guard
from tmm.instrumentation.reference.batch_prefix import Sampling
from tmm.instrumentation.regions import Region


@dataclass(frozen=True, eq=False)
class _Program:
    """What regions of one class, compiled with equal settings, run."""

    key: tuple[type, CompileSettings | None, bool]
    run: Callable[..., Any]
    backend: MeasuringBackend


class RegionPrograms:
    """One program for all regions of one class with equal settings, hence with its graphs.

    ``samples`` are those that a reference sees, None if all.
    """

    def __init__(self, host: Host, samples: int | None) -> None:
        self.kept = KeptByDynamo()
        # Of a model that is dropped, too.
        weakref.finalize(self, self.kept.forget).atexit = False
        self._host = host
        self._samples = samples
        self._programs: list[_Program] = []
        self._isolation_ids: set[int] = set()

    def of(self, region: Region, *, is_traced: bool = True) -> Callable[..., Any]:
        """The program of a region, which is called with what it runs and the arguments."""
        settings = region.settings
        assert settings is not None
        if (known := self._known(region, is_traced=is_traced)) is not None:
            return known.run
        sampling = None
        if self._samples is not None:
            sampling = Sampling(self._samples, is_dynamic=settings.dynamic is True)
        backend = MeasuringBackend(self._host, settings, sampling)
        program, forget = compile_separately(
            *(_traced, settings, backend.compiler(), _keep_guards, region.callee, has_own_hooks),
            is_traced=is_traced,
        )
        self.kept.add(forget)
        key = type(region.callee), settings, is_traced
        self._programs.append(_Program(key, program, backend))
        self._isolation_ids.add(getattr(program, "_isolate_recompiles_id", -1))
        return program

    def has_run_whole(self, region: Region) -> bool:
        """Whether a region has always run as one graph, with all of its module in it."""
        module = region.module
        if module is None or region.settings is None or runs_hooks_outside(region, module):
            return False
        program = self._known(region)
        return program is not None and program.backend.makes_whole_graphs

    def are_being_compiled(self, *, are_running: bool) -> bool:
        """Whether what Dynamo compiles now is one of them, not a function of the user."""
        if HAS_ISOLATION:
            return isolation_id() in self._isolation_ids
        return are_running

    def close(self) -> None:
        """Let go of them; Dynamo, which keeps its entries, must not hold the model."""
        for program in self._programs:
            program.backend.close()
        self.kept.forget()
        self._programs.clear()

    def _known(self, region: Region, *, is_traced: bool = True) -> _Program | None:
        key = type(region.callee), region.settings, is_traced
        return next((program for program in self._programs if program.key == key), None)


def runs_hooks_outside(region: Region, module: torch.nn.Module) -> bool:
    """Whether Dynamo, given ``module`` as a whole, would trace more than the user's program does.

    That begins with the forward: neither hooks nor a ``__call__`` of the user's are in its graphs.
    """
    if region.entry == "call":
        return has_own_hooks(module) or type(module).__call__ is not torch.nn.Module.__call__
    return region.entry == "forward"


def own_forward(module: torch.nn.Module) -> Callable[..., Any]:
    """The forward of a module, as it was before it was compiled."""
    forward = innermost_fn(getattr(module.forward, "__func__", module.forward))
    return MethodType(forward, module) if isinstance(forward, FunctionType) else forward


def _traced(callee: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return callee(*args, **kwargs)


def _keep_guards(entries: Sequence[GuardFilterEntry]) -> list[bool]:
    return [keep_guard(entry) for entry in entries]
