"""A rewritten graph as people look at it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial

import torch
from torch.fx import GraphModule, Node

from tmm.instrumentation.compile_settings import CompileSettings
from tmm.instrumentation.graph_breaks import end_of_graph
from tmm.instrumentation.notes import Notes
from tmm.instrumentation.scope import Scope
from tmm.passes.findings import Lowered
from tmm.passes.graph.printer import NodeLine, node_lines, runnable_code
from tmm.passes.graph.readings import hinted_elements, readings
from tmm.passes.graph.values import value_of
from tmm.passes.pipeline import Rewritten


@dataclass(frozen=True)
class GraphReport:
    """A rewritten graph as ``tmm.explain`` shows it.

    ``before`` and ``after`` are its nodes, ``code`` Python that runs by itself, ``bytes`` the size
    of the extra outputs for the batch that was traced, ``seconds`` the time of each pass,
    ``ended_by`` where and why a graph break ended it (empty where none did), ``readings`` how many
    elements each tensor has that is read once more, ``lowerings`` how rows are computed that the
    compiler might fuse.
    """

    owner: str
    settings: str
    before: tuple[NodeLine, ...]
    after: tuple[NodeLine, ...]
    code: str
    rows: int
    outputs: int
    bytes: int
    seconds: dict[str, float]
    ended_by: str = ""
    index: int = 0
    readings: tuple[int, ...] = ()
    lowerings: tuple[Lowered, ...] = ()

    @property
    def diff(self) -> str:
        """A unified diff of the nodes before and after; inserted ones name pass and site."""
        before, after = (list(map(str, nodes)) for nodes in (self.before, self.after))
        names = (f"graph {self.index}, traced", f"graph {self.index}, measured")
        return "\n".join(difflib.unified_diff(before, after, *names, lineterm="", n=2))

    @staticmethod
    def of(
        module: GraphModule,
        rewritten: Rewritten,
        scope: Scope,
        settings: CompileSettings,
        index: int,
        notes: Notes,
    ) -> GraphReport:
        """That of a graph as it was traced; what cannot be told is one of the ``notes``."""
        subject = subject_of(index, scope)

        def lines(module: GraphModule) -> tuple[NodeLine, ...]:
            return tuple(node_lines(module, scope.modules))

        return GraphReport(
            owner=scope.owner_name,
            settings=notes.attempt(subject, partial(str, settings), ""),
            before=notes.attempt(subject, partial(lines, module), ()),
            after=notes.attempt(subject, partial(lines, rewritten.module), ()),
            code=notes.attempt(subject, partial(runnable_code, rewritten.module), ""),
            rows=len(rewritten.layout.slots)
            + sum(len(row_input.layout.slots) for row_input in rewritten.row_inputs),
            outputs=rewritten.layout.outputs,
            bytes=notes.attempt(subject, partial(_extra_bytes, rewritten), 0),
            seconds=rewritten.seconds,
            ended_by=notes.attempt(subject, partial(end_of_graph, module), ""),
            index=index,
            readings=readings(rewritten.module),
            lowerings=rewritten.lowerings,
        )


def subject_of(index: int, scope: Scope) -> str:
    """What notes about a graph are about."""
    return f"graph {index}, of {scope.owner_name}"


def _extra_bytes(rewritten: Rewritten) -> int:
    count = rewritten.layout.outputs
    (returned,) = rewritten.module.graph.output_node().args
    assert isinstance(returned, (tuple, list))
    extra = [node for node in returned[len(returned) - count :] if isinstance(node, Node)]
    return sum(_hinted_bytes(value_of(node)) for node in extra)


def _hinted_bytes(example: torch.Tensor) -> int:
    return hinted_elements(example) * example.element_size()
