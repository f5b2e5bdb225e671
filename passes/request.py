"""What is asked of one traced graph: decided before the passes run, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch.fx import Node

from tmm.core.metrics import Reduction
from tmm.core.records import AttentionRequest, Site
from tmm.kernels.fused.choose_lowering import Lowering
from tmm.kernels.pairs import Normalization
from tmm.passes.reference.prefix_branch import Samples

Select: TypeAlias = Callable[[Site, torch.dtype], tuple[Reduction, ...]]
"""The reductions of a site whose tensor has a dtype."""


@dataclass(frozen=True)
class CheckedModule:
    """What the refined coordinate check asks of a module.

    ``only_update`` leaves out all but the update term (embeddings). ``has_weight_rows`` adds rows
    without the bias, whose ``id`` is ``bias`` where there is one; ``has_operand_rows`` those of
    W_t x_t and W_0 x_0, and with a ``normalization`` those of the normalized inputs.
    """

    only_update: bool = False
    has_weight_rows: bool = False
    bias: int | None = None
    has_operand_rows: bool = False
    normalization: Normalization | None = None


def _never(node: Node) -> bool:
    return False


@dataclass(frozen=True)
class ComparisonRequest:
    """What is compared with the reference.

    ``select`` gives the reductions of a module's output and its counterpart; ``check`` what the
    refined coordinate check asks of a module. ``parameter`` gives the ``id`` of the tensor that a
    placeholder is, for those that the model holds under a name (parameters, buffers and the like),
    and None for others; ``stays`` tells of those whether the counterpart lies in the same place in
    each step; ``is_part`` tells that the graph is not the whole model: other inputs may
    have counterparts as well, and outputs and what is overwritten are to have them. With
    ``samples`` those items alone are compared. ``refusal`` says why nothing can be.
    """

    select: Select
    check: Callable[[str], CheckedModule | None]
    parameter: Callable[[Node], int | None]
    is_part: bool = False
    samples: Samples | None = None
    refusal: str = ""
    stays: Callable[[Node], bool] = _never

    def checked(self, site: Site) -> CheckedModule | None:
        """What the refined coordinate check asks of the module that a site is of."""
        return None if site.is_shown else self.check(site.module)


@dataclass(frozen=True)
class PlacementRequest:
    """How ranks share a model.

    ``ranks`` are those that share its tensors with this one; of what all of them hold alike, the
    one that ``is_first`` measures. ``equal`` gives the ``id`` of parameters that they hold alike.
    """

    ranks: frozenset[int]
    is_first: bool
    equal: frozenset[int] = frozenset()


@dataclass(frozen=True)
class GraphRequest:
    """What the passes measure of a graph, and what they are to know of it.

    ``modules`` gives the relative name of each module by its ``id``; ``select`` the reductions of
    a module's output, ``select_further`` those of further families that are measured of it,
    ``values`` that of each value recorded by name, ``select_gradient`` the reductions of the
    gradient of an output, which with ``scales_gradients`` is multiplied with the value of an extra
    input first; ``select_attention`` what is asked of the attentions that a module calls,
    ``comparison`` what is compared with a reference. What is None is not asked for.
    ``placements`` says how ranks share the model, if they do. ``begins_forward`` tells that the
    graph is the beginning of a module's forward, ``is_step_function`` that it is that of a step
    function, ``keeps_unused`` that it will run as it stands, unused operations and all,
    ``writes_in_place`` that operators which write into a tensor do so without a copy of it,
    ``fuses`` that the compiler fuses operations, where ``lowering`` says what it is to fuse.
    """

    modules: Mapping[int, str]
    select: Select
    values: Mapping[str, Reduction] = field(default_factory=lambda: MappingProxyType({}))
    select_further: Mapping[str, Select] = field(default_factory=lambda: MappingProxyType({}))
    select_gradient: Select | None = None
    scales_gradients: bool = False
    select_attention: Callable[[str], tuple[AttentionRequest, ...]] | None = None
    comparison: ComparisonRequest | None = None
    placements: PlacementRequest | None = None
    begins_forward: bool = False
    is_step_function: bool = False
    keeps_unused: bool = True
    writes_in_place: bool = False
    fuses: bool = False
    lowering: Lowering = "auto"
