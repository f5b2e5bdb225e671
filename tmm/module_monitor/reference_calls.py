"""The forward passes of a reference that the user runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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
        self._installed: list[tuple[Region, object]] = []
        for callee in (module, *compiled_wrappers(module)):
            self._watch(callee)

    def _watch(self, module: torch.nn.Module) -> None:
        region = region_of(module) or Region(module, None, module)
        holder, note = region.holder, self._note
        assert holder is not None
        original = holder.__dict__.get(region.attribute)
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
        self._installed.append((region, original))

    def stop(self) -> None:
        """Leave the module as it was."""
        for region, original in self._installed:
            assert region.holder is not None
            if original is None:
                region.holder.__dict__.pop(region.attribute, None)
            else:
                region.holder.__dict__[region.attribute] = original
        self._installed.clear()
