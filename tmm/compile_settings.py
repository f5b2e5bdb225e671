"""How a user compiled a model, read back from what ``torch.compile`` returned."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext, innermost_backend
from torch._dynamo.types import GuardFilterEntry

GuardFilter = Callable[[Sequence[GuardFilterEntry]], Sequence[bool]]
CompilerFunction = Callable[..., Any]


@dataclass(frozen=True)
class CompileSettings:
    """The arguments of a ``torch.compile`` call that a second program must share.

    ``backend`` is the user's compiler with its mode and options bound.
    """

    backend: CompilerFunction
    fullgraph: bool
    dynamic: bool | None
    guard_filter: GuardFilter | None

    @property
    def uses_inductor(self) -> bool:
        """Whether graphs are compiled by Inductor."""
        if isinstance(self.backend, torch._TorchCompileInductorWrapper):
            return True
        return getattr(self.backend, "__module__", "").startswith("torch._inductor")


def settings_of(model: OptimizedModule) -> CompileSettings:
    """The settings ``model`` was compiled with.

    Raises ``ValueError`` for a model compiled with ``disable=True``: nothing is traced then.
    """
    context = model.dynamo_ctx
    if not isinstance(context, _TorchDynamoContext) or not callable(context.callback):
        raise ValueError(
            "the model was compiled with disable=True, so that no graph of it exists; compile it"
            " with torch.compile(model)"
        )
    hooks = context._hooks
    return CompileSettings(
        backend=innermost_backend(context.callback),
        fullgraph=context.fullgraph,
        dynamic=context._dynamic,
        guard_filter=None if hooks is None else hooks.guard_filter_fn,
    )


def compile_separately(
    function: Callable[..., Any],
    settings: CompileSettings,
    backend: CompilerFunction,
    guard_filter: GuardFilter,
) -> Callable[..., Any]:
    """Compile ``function`` as the user compiled the model, but by ``backend``.

    What it compiles is kept apart from what the user's own program compiles, also in frames that
    both run after a graph break. A guard is kept only if the user's filter keeps it as well.
    """

    def keep(entries: Sequence[GuardFilterEntry]) -> list[bool]:
        kept = list(guard_filter(entries))
        if settings.guard_filter is not None:
            users = settings.guard_filter(entries)
            kept = [ours and theirs for ours, theirs in zip(kept, users, strict=True)]
        return kept

    isolation: dict[str, bool] = {}
    if "isolate_recompiles" in inspect.signature(torch._dynamo.optimize).parameters:
        isolation["isolate_recompiles"] = True
    # A code object of its own: Dynamo keeps what it compiled by code object.
    assert isinstance(function, types.FunctionType)
    code = function.__code__.replace()
    own = types.FunctionType(code, function.__globals__, function.__name__)
    compiled: Callable[..., Any] = torch._dynamo.optimize(
        backend=backend,
        nopython=settings.fullgraph,
        dynamic=settings.dynamic,
        guard_filter_fn=keep,
        **isolation,
    )(own)
    return compiled
