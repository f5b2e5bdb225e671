"""Modules that rules match and that have no rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from tmm.core.module_names import display_name, is_container, unwrapped
from tmm.instrumentation.twin import Twin

HadGradient: TypeAlias = Callable[[torch.nn.Parameter], bool]
"""Whether a parameter has a gradient, or had one in a monitored step."""

_SHOWN = 6  # names in a warning
_NOT_CALLED = "not called in a monitored step, or what it returned held no tensor"
_UNSEEN = (
    "its parameters got gradients, but no call of it was seen: it is called inside a function"
    " that is compiled by itself, or its parameters are used directly"
)


def silent_modules(twin: Twin, had_gradient: HadGradient) -> dict[str, str]:
    """Name to reason of modules that were matched and have no rows, nor another reason for it.

    Containers, which have no forward, are left out.
    """
    attribution = twin.attribution
    known = {name.partition("[")[0] for name in attribution.unmeasured}
    found = {}
    for module, relative in attribution.names.items():
        name = display_name(relative)
        if is_container(module):
            continue
        if attribution.how_measured(module) or name in known or name in attribution.unmeasured:
            continue
        if twin.outside.asks_for(name):
            found[name] = (
                _UNSEEN if _was_used(twin, module, relative, had_gradient) else _NOT_CALLED
            )
    return found


def used(silent: dict[str, str]) -> dict[str, str]:
    """Those that were used all the same."""
    return {name: reason for name, reason in silent.items() if reason is _UNSEEN}


def warning_of(silent: dict[str, str]) -> str | None:
    """What a user should know of them at once; nothing of modules that were just not called."""
    names = list(used(silent))
    if not names:
        return None
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (
        f"{', '.join(names[:_SHOWN])}{more}: matched by a rule, but without rows: {_UNSEEN}."
        " Instrument the function that calls it, tmm.instrument(torch.compile(step), spec,"
        " module=model), or leave it out with exclude=; tmm.explain(model).unmeasured names all"
    )


def _was_used(
    twin: Twin, module: torch.nn.Module, relative: str, had_gradient: HadGradient
) -> bool:
    """Whether a parameter that no measured module holds as its own had a gradient.

    A module that runs itself may use those of its children, as ``nn.MultiheadAttention`` does.
    """
    attribution = twin.attribution
    parents = [
        parent for parent, name in attribution.names.items() if name == relative.rpartition(".")[0]
    ]
    if any(
        attribution.how_measured(parent) and parent is not unwrapped(twin.module)
        for parent in parents
    ):
        return False
    seen = {
        id(parameter)
        for other in attribution.names
        if attribution.how_measured(other)
        for parameter in other.parameters(recurse=False)
    }
    own = module.parameters(recurse=False)
    return any(id(parameter) not in seen and had_gradient(parameter) for parameter in own)
