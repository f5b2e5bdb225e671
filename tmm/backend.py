"""The compiler backend of the monitored program: the passes, then the user's own backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.fx import GraphModule

from tmm.compile_settings import CompileSettings
from tmm.layout import Measurement, PackedLayout, Site
from tmm.metrics import Reduction
from tmm.passes.insert_reductions import ReductionOptions
from tmm.passes.pipeline import rewrite

OUTSIDE = "//"
"""Prefix of the name of a site that does not lie under the module whose frame was traced."""


@dataclass(frozen=True)
class Scope:
    """Where a frame is traced: its module (the owner) and what modules are called from there."""

    owner: torch.nn.Module
    modules: Mapping[int, str]
    select: Callable[[str, torch.dtype], tuple[Reduction, ...]]


class Host(Protocol):
    """The side of the running program that a backend needs."""

    def scope(self) -> Scope:
        """The scope of the frame that is being compiled."""

    def leave_out(self, owner: torch.nn.Module, unmeasured: tuple[tuple[Site, str], ...]) -> None:
        """Remember which sites of a frame of ``owner`` have no rows, and why."""

    def collect(
        self,
        graph: MeasuredGraph,
        inputs: Sequence[object],
        extra: Sequence[torch.Tensor],
    ) -> None:
        """Take what one call of ``graph`` measured."""


@dataclass(frozen=True)
class Witness:
    """A parameter among a graph's inputs: it tells which of several equal modules is running."""

    input: int
    parameter: str


class MeasuredGraph:
    """A compiled, rewritten graph: gives back the outputs of the original one, keeps the rest."""

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        layout: PackedLayout,
        owner: torch.nn.Module,
        witness: Witness | None,
        host: Host,
    ) -> None:
        self.run = run
        self.layout = layout
        self.owner = owner
        self.witness = witness
        self.host = host

    def __call__(self, *inputs: object) -> Sequence[Any]:
        """Run the graph."""
        outputs = self.run(*inputs)
        extra = self.layout.outputs
        if not extra:
            return outputs
        self.host.collect(self, inputs, outputs[-extra:])
        return outputs[:-extra]

    def outside(self, measurement: Measurement) -> bool:
        """Whether the site lies outside of the module whose frame was traced."""
        return measurement.site.module.startswith(OUTSIDE)


class MeasuringBackend:
    """Rewrites each traced graph and hands it to the user's backend."""

    def __init__(self, host: Host, settings: CompileSettings) -> None:
        self.host = host
        self.settings = settings
        self.graphs: list[MeasuredGraph] = []
        # What Dynamo reads from a backend besides calling it.
        for name in ("get_compiler_config", "backend_ctx_ctor", "reset"):
            if hasattr(settings.backend, name):
                setattr(self, name, getattr(settings.backend, name))

    def __call__(self, module: GraphModule, inputs: list[torch.Tensor]) -> MeasuredGraph:
        """Compile ``module`` with its measurements."""
        scope = self.host.scope()
        options = ReductionOptions(
            scope.modules, scope.select, compiled=self.settings.uses_inductor
        )
        rewritten = rewrite(module, options)
        self.host.leave_out(scope.owner, rewritten.layout.unmeasured)
        witness = _find_witness(module, scope.owner)
        run = self.settings.backend(rewritten.module, inputs)
        graph = MeasuredGraph(run, rewritten.layout, scope.owner, witness, self.host)
        self.graphs.append(graph)
        return graph


def _find_witness(module: GraphModule, owner: torch.nn.Module) -> Witness | None:
    names = {id(parameter): name for name, parameter in owner.named_parameters()}
    for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
        argument = node.meta.get("grapharg")
        if argument is not None and id(argument.example) in names:
            return Witness(index, names[id(argument.example)])
    return None
