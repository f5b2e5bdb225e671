"""A compiled, rewritten graph as the program runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.fx import GraphModule

from tmm.core.records import OUTSIDE, Measurement, Site
from tmm.core.torch_private import FakeTensor
from tmm.instrumentation.graph_report import GraphReport
from tmm.instrumentation.notes import Notes
from tmm.instrumentation.pass_trace import TraceFolder
from tmm.instrumentation.reference.batch_prefix import LOST_ITEMS
from tmm.instrumentation.scope import Scope
from tmm.kernels.fused.choose_lowering import Lowering
from tmm.passes.findings import RowInput
from tmm.passes.graph.values import argument_of
from tmm.passes.pipeline import Rewritten

if TYPE_CHECKING:
    from tmm.instrumentation.reference.comparison import Comparing


class Host(Protocol):
    """The side of the running program that a backend needs."""

    graphs: list[MeasuredGraph]
    trace: TraceFolder | None
    notes: Notes
    lowering: Lowering

    @property
    def comparing(self) -> Comparing | None:
        """What is known of the reference, if the model is compared with one."""

    @property
    def frame(self) -> torch.nn.Module:
        """The module whose frame is running."""

    @property
    def scales_gradients(self) -> bool:
        """Whether gradients carry a scaler's factor that is to be taken out."""

    def scope(self) -> Scope:
        """The scope of the frame that is being compiled."""

    def leave_out(self, owner: torch.nn.Module, unmeasured: tuple[tuple[Site, str], ...]) -> None:
        """Remember which sites of a frame of ``owner`` have no rows, and why."""

    def leave_out_evaluations(self, count: int) -> None:
        """Remember how many calls of the model a graph of a step function does not measure."""

    def collect(
        self,
        graph: MeasuredGraph,
        inputs: Sequence[object],
        extra: Sequence[torch.Tensor],
    ) -> None:
        """Take what one call of ``graph`` measured."""

    def follow(self, outputs: Sequence[object]) -> None:
        """Take the outputs of one call of a graph, from which a backward pass may come back."""

    def gradient_rows(
        self, graph: MeasuredGraph, inputs: Sequence[object], wanted: RowInput
    ) -> torch.Tensor:
        """An extra input of one call of ``graph``, whose gradient will hold rows."""

    @property
    def is_bearing(self) -> bool:
        """Whether a fault of the monitoring may cost a step its rows, but not end it."""

    def bear(self, error: Exception) -> None:
        """Let the step, in which a graph runs unmeasured, go on without a record."""


@dataclass(frozen=True)
class Witness:
    """A parameter among a graph's inputs: it tells which of several equal modules is running."""

    input: int
    parameter: str

    @staticmethod
    def of(module: GraphModule, owner: torch.nn.Module) -> Witness | None:
        """The first parameter of ``owner`` among the inputs of a graph; None without one."""
        names = {id(parameter): name for name, parameter in owner.named_parameters()}
        for index, node in enumerate(module.graph.find_nodes(op="placeholder")):
            argument = argument_of(node)
            if argument is not None and id(argument.example) in names:
                return Witness(index, names[id(argument.example)])
        return None


class MeasuredGraph:
    """A compiled, rewritten graph: gives back the outputs of the original one, keeps the rest."""

    def __init__(
        self,
        run: Callable[..., Sequence[Any]],
        rewritten: Rewritten,
        report: GraphReport,
        owner: torch.nn.Module,
        witness: Witness | None,
        host: Host,
        *,
        examples: Sequence[object],
        has_own_randomness: bool,
        loses_reference: bool,
        is_evaluation: bool = False,
    ) -> None:
        self.run = run
        self.examples = examples
        self.layout = rewritten.layout
        self.row_inputs = rewritten.row_inputs
        self.reference = rewritten.reference
        self.placed_ends = rewritten.placed_ends
        self.has_own_randomness = has_own_randomness
        self.loses_reference = loses_reference
        self.is_evaluation = is_evaluation
        self.report = report
        self.owner = owner
        self.witness = witness
        self.host = host

    def __call__(self, *inputs: object) -> Sequence[Any]:
        """Run the graph."""
        if FakeTensor in map(type, inputs):
            # DistributedDataParallel's buckets: how the outputs will lie in memory is found out.
            outputs = self.run(*inputs, *self.examples)
            return outputs[: len(outputs) - self.layout.outputs - self.reference.added]
        self.examples = ()
        comparing = self.host.comparing
        counterparts: Sequence[torch.Tensor] = ()
        if comparing is not None:
            counterparts = comparing.counterparts(self.reference, inputs, self.host.frame)
        rows = [self.host.gradient_rows(self, inputs, wanted) for wanted in self.row_inputs]
        with nullcontext() if comparing is None else comparing.inside_graph():
            outputs = self.run(*inputs, *counterparts, *rows)
        extra, added = self.layout.outputs, self.reference.added
        own = len(outputs) - extra - added
        if comparing is not None:
            comparing.take(self.reference, inputs, outputs[:own], outputs[own : own + added])
            if self.loses_reference:
                comparing.end(LOST_ITEMS)
        self.host.collect(self, inputs, outputs[len(outputs) - extra :])
        self.host.follow(outputs[:own])
        if self.placed_ends.hold_for(inputs):
            self.placed_ends.note(tuple(outputs[:own]))
        return outputs[:own]

    def outside(self, measurement: Measurement) -> bool:
        """Whether the site lies outside of the module whose frame was traced."""
        return measurement.site.module.startswith(OUTSIDE)
