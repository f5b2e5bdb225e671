"""The parts of a model that are compiled, each on its own."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tmm.core.dynamo_private import OptimizedModule, is_skipped, skip_code
from tmm.core.torch_private import module_call, module_wrapped_call
from tmm.instrumentation.compile_settings import CompileSettings, settings_of

COMPILED_CALL = "_compiled_call_impl"
"""Where ``module.compile()`` puts what ``module(...)`` then calls. Copies do not carry it."""


Entry = Literal["callee", "call", "forward"]
"""What of a region the user compiled: all of it, a call that torch begins, or a forward."""

_BEGUN_BY_TORCH = (
    module_call.__code__,
    module_wrapped_call.__code__,
)


@dataclass(frozen=True, eq=False)
class Region:
    """A module or function that is called as a whole.

    ``holder.attribute`` is what a call of it runs; a function has no holder. Without settings the
    region is not compiled, and only the regions inside of it are. Hooks of the module run inside of
    the compiled program only where the ``entry`` is ``"callee"``: Dynamo leaves torch's own code of
    a call alone, and begins with the forward.
    """

    callee: Callable[..., Any]
    settings: CompileSettings | None
    holder: torch.nn.Module | None = None
    attribute: str = COMPILED_CALL
    entry: Entry = "callee"

    @property
    def module(self) -> torch.nn.Module | None:
        """The module that runs, if it is one."""
        return self.callee if isinstance(self.callee, torch.nn.Module) else None


def region_of(module: torch.nn.Module) -> Region | None:
    """The region that a call of ``module`` itself enters; None if it is not compiled."""
    if isinstance(module, OptimizedModule):
        inner: torch.nn.Module = module._orig_mod
        settings = settings_of(module)
        if settings is None:
            return None
        # A lazy module is initialized by what stands there, before this.
        call = vars(module).get("_forward", vars(module).get("forward"))
        return Region(inner, settings, module, "forward", _entry(call))
    call = behind_switches(module.__dict__.get(COMPILED_CALL))
    if (settings := settings_of(call)) is not None:
        return Region(module, settings, module, entry=_entry(call))
    # As by @torch.compile on the method, or model.forward = torch.compile(model.forward).
    settings = settings_of(getattr(module.forward, "__func__", module.forward))
    return None if settings is None else Region(module, settings, module, entry="forward")


def _entry(compiled: object) -> Entry:
    inner = getattr(behind_switches(compiled), "_torchdynamo_orig_callable", None)
    return "call" if getattr(inner, "__code__", None) in _BEGUN_BY_TORCH else "callee"


def is_left_uncompiled(model: object) -> bool:
    """Whether ``model.compile()`` was called, and none of its modules has a forward to compile."""
    if not isinstance(model, torch.nn.Module) or isinstance(model, OptimizedModule):
        return False
    if COMPILED_CALL not in vars(model) or region_of(model) is None:
        return False
    parts = list(model.modules())
    own = any("forward" in vars(part) for part in parts)
    return not own and all(is_skipped(type(part).forward) for part in parts)


def regions_in(module: torch.nn.Module) -> list[Region]:
    """All regions among ``module`` and its descendants, outer ones first."""
    regions = (region_of(child) for child in module.modules())
    return [region for region in regions if region is not None]


def behind_switches(call: object) -> object:
    """What stood in place of a switch before, through any number of them."""
    while (switch := getattr(call, "tmm_switch", None)) is not None:
        call = switch.original
    return call


def install(region: Region, forward: Callable[..., Any]) -> None:
    """Let calls of ``region`` run ``forward``, which Dynamo is not to look into.

    It stands in an attribute that copies and pickles do not carry, so that those are clean.
    """
    assert isinstance(forward, types.FunctionType)
    skip_code(forward.__code__)
    if region.attribute == COMPILED_CALL:
        # Another torch.compile around it traces what it would trace without us.
        inner = region.callee if region.module is None else region.module._call_impl
        forward.__dict__.update(_torchdynamo_inline=inner, _torchdynamo_orig_callable=inner)
    if region.holder is not None:
        region.holder.__dict__[region.attribute] = forward


def compiled_wrappers(module: torch.nn.Module) -> list[torch.nn.Module]:
    """What ``torch.compile(module)`` has given and is still there."""
    found = (wrapper for wrapper in gc.get_objects() if type(wrapper) is OptimizedModule)
    return [wrapper for wrapper in found if wrapper._modules.get("_orig_mod") is module]
