"""Where a graph is traced, and what is asked of the modules that it calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tmm.core.metrics import Reduction
from tmm.core.records import AttentionRequest, Site
from tmm.passes.request import CheckedModule, PlacementRequest


@dataclass(frozen=True)
class Comparison:
    """What is compared with a reference: see ``ReferenceOptions``."""

    select: Callable[[Site, torch.dtype], tuple[Reduction, ...]]
    check: Callable[[str], CheckedModule | None]


@dataclass(frozen=True)
class Scope:
    """Where a frame is traced: its module (the owner) and what modules are called from there.

    ``further`` selects for further families of outputs. ``values`` says how what the model records
    by name is reduced, ``select_gradient`` which gradients of outputs are measured, ``comparison``
    what is compared and ``attention`` what is asked of attentions (None if nothing is),
    ``placements`` how ranks share the model, if they do; ``is_root`` tells that the owner is the
    whole model, ``is_step_function`` that the frame is that of a function that calls it.
    """

    owner: torch.nn.Module
    owner_name: str
    modules: Mapping[int, str]
    select: Callable[[Site, torch.dtype], tuple[Reduction, ...]]
    values: Mapping[str, Reduction]
    select_gradient: Callable[[Site, torch.dtype], tuple[Reduction, ...]] | None = None
    comparison: Comparison | None = None
    attention: Callable[[str], tuple[AttentionRequest, ...]] | None = None
    placements: PlacementRequest | None = None
    is_root: bool = False
    is_step_function: bool = False
    further: Mapping[str, Callable[[Site, torch.dtype], tuple[Reduction, ...]]] = field(
        default_factory=dict
    )
