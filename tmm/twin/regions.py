"""The parts of a model that are compiled, each on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.eval_frame import OptimizedModule

from tmm.twin.compile_settings import CompileSettings, settings_of

COMPILED_CALL = "_compiled_call_impl"
"""Where ``module.compile()`` puts what ``module(...)`` then calls. Copies do not carry it."""


@dataclass(frozen=True, eq=False)
class Region:
    """A module or function that is called as a whole.

    ``holder.attribute`` is what a call of it runs; a function has no holder. Without settings the
    region is not compiled, and only the regions inside of it are.
    """

    callee: Callable[..., Any]
    settings: CompileSettings | None
    holder: torch.nn.Module | None = None
    attribute: str = COMPILED_CALL

    @property
    def module(self) -> torch.nn.Module | None:
        """The module that runs, if it is one."""
        return self.callee if isinstance(self.callee, torch.nn.Module) else None


def region_of(module: torch.nn.Module) -> Region | None:
    """The region that a call of ``module`` itself enters; None if it is not compiled."""
    if isinstance(module, OptimizedModule):
        inner: torch.nn.Module = module._orig_mod
        settings = settings_of(module)
        return None if settings is None else Region(inner, settings, module, "forward")
    settings = settings_of(behind_dispatches(module.__dict__.get(COMPILED_CALL)))
    if settings is None:
        # As by @torch.compile on the method, or model.forward = torch.compile(model.forward).
        settings = settings_of(getattr(module.forward, "__func__", module.forward))
    return None if settings is None else Region(module, settings, module)


def regions_in(module: torch.nn.Module) -> list[Region]:
    """All regions among ``module`` and its descendants, outer ones first."""
    regions = (region_of(child) for child in module.modules())
    return [region for region in regions if region is not None]


def behind_dispatches(call: object) -> object:
    """What stood in place of a dispatch before, through any number of them."""
    while (dispatch := getattr(call, "tmm_dispatch", None)) is not None:
        call = dispatch.original
    return call
