"""How a user compiled something, read back from what ``torch.compile`` returned."""

from __future__ import annotations

import inspect
import types
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tmm.core.dynamo_private import (
    ConvertFrameReturn,
    DisableContext,
    GuardFilterEntry,
    InvalidBackend,
    OptimizedModule,
    TorchDynamoContext,
    cached_backends,
    dynamo_config,
    eager_backend,
    eager_noexcept_backend,
    innermost_backend,
    is_skipped,
    optimize,
    remove_from_cache,
    skip_code,
)
from tmm.core.inductor_private import inductor_config
from tmm.core.torch_private import InductorWrapper
from tmm.instrumentation.eager_backend import eager as uncompiled

HAS_ISOLATION = "isolate_recompiles" in inspect.signature(torch.compile).parameters
"""Whether programs that run the same frames can keep what they compile apart (torch 2.13)."""

GuardFilter = Callable[[Sequence[GuardFilterEntry]], Sequence[bool]]
CompilerFunction = Callable[..., Any]


@dataclass(frozen=True)
class CompileSettings:
    """The arguments of a ``torch.compile`` call that a second program must share.

    ``backend`` is the user's compiler with its mode and options bound. ``traced_for`` is what a
    model is traced for that is not compiled, and is not to notice; empty for one that is.
    """

    backend: CompilerFunction
    fullgraph: bool
    dynamic: bool | None
    guard_filter: GuardFilter | None
    recompile_limit: int | None = None
    traced_for: str = ""

    @property
    def uses_inductor(self) -> bool:
        """Whether Inductor compiles the graphs."""
        module: str = getattr(self.backend, "__module__", "")
        return isinstance(self.backend, InductorWrapper) or module.startswith("torch._inductor")

    @property
    def draws_its_own_random_numbers(self) -> bool:
        """Whether compiled programs draw other random numbers than eager ones, as Inductor's do."""
        return self.uses_inductor and not inductor_config().fallback_random

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether a run may overwrite the outputs of the one before: its options say so, or all."""
        given = self.backend, getattr(self.backend, "compiler_fn", None)
        if any(getattr(each, "compiler_name", None) == "cudagraphs" for each in given):
            return True
        config = getattr(self.backend, "config", None)
        own = config.get("triton.cudagraphs") if isinstance(config, dict) else None
        if own is None:
            return self.uses_inductor and bool(inductor_config().triton.cudagraphs)
        return bool(own)

    @property
    def keeps_unused_operations(self) -> bool:
        """Whether a graph surely runs as it was traced, with what nobody uses."""
        compiler = getattr(self.backend, "compiler_fn", self.backend)
        return compiler in (uncompiled, eager_backend, eager_noexcept_backend)

    def __str__(self) -> str:
        if self.traced_for:
            return f"not compiled, but traced on monitored steps for {self.traced_for}"
        kinds = (getattr(self.backend, name, None) for name in ("compiler_name", "__name__"))
        backend = next((kind for kind in kinds if kind), type(self.backend).__name__)
        parts = [f"backend={str(backend)!r}"]
        if self.fullgraph:
            parts.append("fullgraph=True")
        if self.dynamic is not None:
            parts.append(f"dynamic={self.dynamic}")
        return ", ".join(parts)


def settings_of(compiled: object) -> CompileSettings | None:
    """The settings of a module or function that ``torch.compile`` returned, else None.

    Also None for what was compiled with ``disable=True``: no graph of it exists.
    """
    context = _context(compiled)
    if context is None or isinstance(context, DisableContext) or not callable(context.callback):
        return None
    hooks = context._hooks
    return CompileSettings(
        backend=innermost_backend(context.callback),
        fullgraph=context.fullgraph,
        dynamic=context._dynamic,
        guard_filter=None if hooks is None else hooks.guard_filter_fn,
        recompile_limit=_recompile_limit(context.callback),
    )


def settings_for(backend: str | CompilerFunction) -> CompileSettings:
    """What ``torch.compile(..., backend=backend)`` would set.

    Raises ``ValueError`` for a backend that does not exist.
    """
    before = set(cached_backends)
    try:
        settings = settings_of(torch.compile(lambda: None, backend=backend))
    except InvalidBackend as error:
        known = ", ".join(["inductor", *torch.compiler.list_backends(exclude_tags=())])
        raise ValueError(f"backend={backend!r} is not known; there are {known}") from error
    finally:
        for added in cached_backends.keys() - before:
            del cached_backends[added]  # each call adds one that torch would keep
    assert settings is not None
    return settings


def compile_separately(
    function: Callable[..., Any],
    settings: CompileSettings,
    backend: CompilerFunction,
    guard_filter: GuardFilter,
    callee: Callable[..., Any],
    has_hooks: Callable[[torch.nn.Module], bool] | None = None,
    *,
    is_traced: bool = True,
) -> tuple[Callable[..., Any], Callable[[], None]]:
    """Compile ``function`` as the user compiled ``callee``, which it calls, but by ``backend``.

    What it compiles is kept apart from what the user's own program compiles, also in frames that
    both run after a graph break. A guard is kept only if the user's filter keeps it as well.
    ``has_hooks`` tells whether a module has hooks of the user's, where it may have others, too.
    Where ``function`` is not to be traced, graphs begin in what it calls. The second result lets
    Dynamo forget the program, which must not run afterwards.
    """

    def keep(entries: Sequence[GuardFilterEntry]) -> list[bool]:
        if not HAS_ISOLATION:
            # Older Dynamo makes the guards once more after filtering, and refuses an attribute that
            # is a new object each time it is read.
            for entry in entries:
                entry.orig_guard.obj_weakref = None
        kept = list(guard_filter(entries))
        if settings.guard_filter is not None:
            users = settings.guard_filter(entries)
            kept = [ours and theirs for ours, theirs in zip(kept, users, strict=True)]
        return kept

    limits: dict[str, Any] = {}
    if HAS_ISOLATION:
        limits["isolate_recompiles"] = True
    if settings.recompile_limit is not None:
        limits["recompile_limit"] = settings.recompile_limit
    # A code object of its own: Dynamo keeps what it compiled by code object. And a name of its own,
    # by which it remembers sizes: those that differ between two models would become dynamic.
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{_fingerprint(callee):08x}")
    own = types.FunctionType(code, function.__globals__, function.__name__)
    if not is_traced:
        skip_code(code)
    context = optimize(
        backend=backend,
        nopython=settings.fullgraph,
        dynamic=settings.dynamic,
        guard_filter_fn=keep,
        **limits,
    )
    if has_hooks is not None:
        context.callback = UsersFrames(context.callback, has_hooks)  # type: ignore
    compiled: Callable[..., Any] = context(own)
    return room_for_two(compiled), partial(_forget, code, id(backend))


def _forget(code: types.CodeType, backend: int) -> None:
    # What Dynamo keeps with a code object refers to that in turn, where no collector sees it.
    remove_from_cache(code)
    cached_backends.pop(backend, None)


class UsersFrames:
    """Dynamo's callback for frames, such that it compiles those that the user's program compiles.

    Dynamo compiles the ``forward`` of a module of torch itself that has hooks, and runs it as it is
    otherwise. Hooks that only monitored steps have are not to count.
    """

    def __init__(
        self, callback: Callable[..., Any], has_hooks: Callable[[torch.nn.Module], bool]
    ) -> None:
        self._torchdynamo_orig_backend = callback  # Dynamo follows this name to the backend
        self._has_hooks = has_hooks

    def __call__(self, frame: types.FrameType, *state: Any) -> Any:
        """What is to run in place of ``frame``."""
        code = frame.f_code
        module = frame.f_locals.get("self") if code.co_name == "forward" else None
        is_unhooked = isinstance(module, torch.nn.Module) and not self._has_hooks(module)
        if is_unhooked and is_skipped(code):
            return ConvertFrameReturn()
        return self._torchdynamo_orig_backend(frame, *state)


def _fingerprint(callee: Callable[..., Any]) -> int:
    """The same for models of one class and shape, in each process."""
    kind = callee if inspect.isroutine(callee) else type(callee)
    parts = [f"{kind.__module__}.{kind.__qualname__}"]
    if isinstance(callee, torch.nn.Module):
        for name, parameter in callee.named_parameters():
            shape = "lazy" if torch.nn.parameter.is_lazy(parameter) else tuple(parameter.shape)
            parts.append(f"{name}: {shape}")
    return zlib.crc32("\n".join(parts).encode())


def room_for_two(program: Callable[..., Any]) -> Callable[..., Any]:
    """``program``, such that it and a second one that runs the same frames can be compiled.

    Before torch 2.13, both of them count towards Dynamo's limit of the versions of a frame, as
    after a graph break: without more room, one would have the other one run eagerly.
    """
    if HAS_ISOLATION:
        return program
    room = {
        name: 2 * getattr(dynamo_config, name)
        for name in ("recompile_limit", "accumulated_recompile_limit")
    }

    def run(*args: Any, **kwargs: Any) -> Any:
        with dynamo_config.patch(**room):
            return program(*args, **kwargs)

    return run


def _recompile_limit(callback: object) -> int | None:
    """The limit of this program alone, where the user set one."""
    while callback is not None:
        if (limit := getattr(callback, "_recompile_limit", None)) is not None:
            return int(limit)
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    return None


def _context(compiled: object) -> TorchDynamoContext | None:
    if isinstance(compiled, OptimizedModule):
        context: object = compiled.dynamo_ctx
    elif isinstance(compiled, types.FunctionType) and hasattr(
        compiled, "_torchdynamo_orig_callable"
    ):
        # What torch.compile makes of a function keeps its settings in its closure only.
        cells = zip(compiled.__code__.co_freevars, compiled.__closure__ or (), strict=True)
        context = {name: cell.cell_contents for name, cell in cells}.get("self")
    else:
        return None
    return context if isinstance(context, TorchDynamoContext) else None
