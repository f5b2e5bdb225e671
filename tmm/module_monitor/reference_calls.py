"""The forward passes of a reference that the user runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from tmm.core.replacement import Replacement
from tmm.instrumentation.regions import Region, compiled_wrappers, install, region_of
from tmm.module_monitor.mixin import MonitorMixin

Note = Callable[[tuple[Any, ...], dict[str, Any]], bool]
"""Takes the arguments of a call; tells whether the call is in a monitored step."""


class ReferenceCalls:
    """Tells of each call of a module, also of a compiled one, until ``stop``.

    ``are_running`` tells whether one is under way.
    """

    def __init__(self, module: torch.nn.Module, note: Note) -> None:
        self.are_running = False
        self._note = note
        self._calls = ExitStack()
        for callee in (module, *compiled_wrappers(module)):
            self._watch(callee)

    def _watch(self, module: torch.nn.Module) -> None:
        region = region_of(module) or Region(module, None, module)
        holder, note = region.holder, self._note
        assert holder is not None
        call = Replacement(holder, region.attribute)
        original = call.current(None)
        plain = holder._call_impl if original is None else original

        logs = any(isinstance(part, MonitorMixin) for part in module.modules())
        uncompiled = torch.compiler.disable(plain)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.are_running or not (note(args, kwargs) and logs):
                return plain(*args, **kwargs)
            self.are_running = True
            try:
                # Compiled modules of a reference log nothing, whether they or what calls them are.
                with torch.compiler.set_stance("force_eager"):
                    return uncompiled(*args, **kwargs)
            finally:
                self.are_running = False

        install(region, forward)
        self._calls.enter_context(call)

    def stop(self) -> None:
        """Leave the module as it was."""
        self._calls.close()
