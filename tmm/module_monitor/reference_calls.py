"""The forward passes of a reference that the user runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tmm.twin.regions import Region, compiled_wrapper, install, region_of

Note = Callable[[tuple[Any, ...], dict[str, Any]], None]
"""Takes the arguments of a call."""


class ReferenceCalls:
    """Tells of each call of a module, also of a compiled one, until ``stop``."""

    def __init__(self, module: torch.nn.Module, note: Note) -> None:
        self._note = note
        self._installed: list[tuple[Region, object]] = []
        self._watch(module)
        if (wrapper := compiled_wrapper(module)) is not module:
            self._watch(wrapper)

    def _watch(self, module: torch.nn.Module) -> None:
        region = region_of(module) or Region(module, None, module)
        holder, note = region.holder, self._note
        assert holder is not None
        original = holder.__dict__.get(region.attribute)
        plain = holder._call_impl if original is None else original

        def forward(*args: Any, **kwargs: Any) -> Any:
            note(args, kwargs)
            return plain(*args, **kwargs)

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
