"""Run the passes over a traced graph: the one place that orders, checks, times and names them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch.fx import GraphModule

from tmm.core.records import PackedLayout
from tmm.passes.find_gradient_placements import find_gradient_placements
from tmm.passes.find_placements import find_placements
from tmm.passes.findings import GraphFindings, Lowered, ReferenceEnds, RowInput
from tmm.passes.fuse_reductions import fuse_reductions
from tmm.passes.graph.copy import copy_graph
from tmm.passes.graph.placed_edges import PlacedEnds
from tmm.passes.graph.provenance import all_nodes, sign_new_nodes
from tmm.passes.insert_attention import asks_attention, insert_attention
from tmm.passes.insert_gradient_probes import insert_probes
from tmm.passes.insert_reductions import insert_reductions
from tmm.passes.insert_reference import insert_reference
from tmm.passes.join_identities import join_identities
from tmm.passes.lift_rows import lift_rows
from tmm.passes.pack_rows import pack_rows
from tmm.passes.remove_dead_marks import remove_dead_marks
from tmm.passes.remove_evaluations import remove_evaluations
from tmm.passes.remove_taps import remove_taps
from tmm.passes.request import GraphRequest


@dataclass(frozen=True)
class Pass:
    """Changes a graph in place as a request asks, or finds something out about it.

    ``is_asked`` tells whether a request is any of its business.
    """

    apply: Callable[[GraphModule, GraphRequest, GraphFindings], None]
    is_asked: Callable[[GraphRequest, GraphModule], bool] = lambda request, module: True

    @property
    def name(self) -> str:
        """The name of its function."""
        return self.apply.__name__


PASSES = (
    Pass(join_identities, lambda request, _: request.keeps_unused),
    Pass(remove_evaluations, lambda request, _: request.is_step_function),
    Pass(remove_dead_marks, lambda request, _: not request.keeps_unused),
    Pass(find_placements, lambda request, _: request.placements is not None),
    Pass(find_gradient_placements, lambda request, _: request.placements is not None),
    Pass(insert_reductions),
    Pass(insert_attention, asks_attention),
    Pass(insert_reference, lambda request, _: request.comparison is not None),
    Pass(insert_probes, lambda request, _: request.select_gradient is not None),
    Pass(remove_taps),
    Pass(fuse_reductions, lambda request, _: request.fuses),
    Pass(lift_rows),
    Pass(pack_rows),
)
"""All passes, in their order."""

NEEDED = frozenset({"remove_taps", "lift_rows", "pack_rows"})
"""Passes without which a graph does not run."""

LEFT_OUT = "TMM_PASSES"
"""The environment variable that leaves passes out by name, to find the one that a fault is of."""


class PassError(RuntimeError):
    """A pass failed on a graph; names the pass and the passes that ran before it."""


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph, what its extra inputs and outputs hold, and the seconds of each pass.

    ``evaluations`` is how many calls of the model were left out as those of an evaluation,
    ``lowerings`` tell how sites are measured, where the compiler fuses, ``placed_ends`` how ranks
    share what enters and leaves the graph.

    Extra inputs are those of the reference, then ``row_inputs``; extra outputs those of the
    reference, then those of ``layout``.
    """

    module: GraphModule
    layout: PackedLayout
    reference: ReferenceEnds
    row_inputs: tuple[RowInput, ...]
    lowerings: tuple[Lowered, ...]
    seconds: dict[str, float]
    evaluations: int = 0
    placed_ends: PlacedEnds = field(default_factory=PlacedEnds)


Watch = Callable[[str, GraphModule, float], None]
"""Called with the name of each pass, the graph after it and the seconds that it took."""


def rewrite(
    module: GraphModule,
    request: GraphRequest,
    *,
    watch: Watch | None = None,
    without: Iterable[str] | None = None,
) -> Rewritten:
    """Measure what is asked for of the marked tensors of ``module``, in a copy of it.

    The copy takes and returns what ``module`` does, and then what ``Rewritten`` says. Passes whose
    names are in ``without`` are left out; what ``TMM_PASSES`` names, if that is None.
    Raises ``ValueError`` for a user's metric that cannot be traced, or a pass that does not exist
    or is needed, and ``PassError`` for a fault of a pass.
    """
    left_out = passes_left_out(os.environ.get(LEFT_OUT, "")) if without is None else set(without)
    rewritten, found = copy_graph(module), GraphFindings()
    seconds: dict[str, float] = {}
    for each in PASSES:
        name = each.name
        if name in left_out or not each.is_asked(request, rewritten):
            continue
        known = set(all_nodes(rewritten))
        started = time.perf_counter()
        try:
            each.apply(rewritten, request, found)
            rewritten.graph.lint()
        except ValueError:
            raise
        except Exception as error:
            ran = ", ".join(seconds) or "none"
            raise PassError(f"pass {name} failed ({error!r}); passes before it: {ran}") from error
        seconds[name] = time.perf_counter() - started
        sign_new_nodes(rewritten, name, known)
        if watch is not None:
            watch(name, rewritten, seconds[name])
    rewritten.recompile()
    return Rewritten(
        *(rewritten, found.layout, found.reference, found.row_inputs, tuple(found.lowerings)),
        seconds=seconds,
        evaluations=found.evaluations,
        placed_ends=found.placed_ends,
    )


def passes_left_out(text: str) -> set[str]:
    """The passes that a text such as ``"-insert_attention,-insert_probes"`` leaves out.

    Raises ``ValueError`` for one that does not exist, or without which no graph runs.
    """
    names = {name.strip().removeprefix("-") for name in text.split(",") if name.strip()}
    may_be = [each.name for each in PASSES if each.name not in NEEDED]
    for name in sorted(names.difference(may_be)):
        raise ValueError(
            f"{LEFT_OUT}={text!r}: {name!r} cannot be left out; choose among"
            f" {', '.join('-' + known for known in may_be)}"
        )
    return names
