"""Run the passes over a traced graph: the one place that checks, times and names failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from torch.fx import GraphModule

from tmm.layout import PackedLayout, Site
from tmm.passes.copy_graph import copy_graph
from tmm.passes.gradient_placements import find_gradient_shares
from tmm.passes.insert_attention import AttentionOptions, insert_attention
from tmm.passes.insert_probes import ProbeOptions, RowInput, insert_probes
from tmm.passes.insert_reductions import ReductionOptions, insert_reductions
from tmm.passes.insert_reference import ReferenceEnds, ReferenceOptions, insert_reference
from tmm.passes.join_identities import join_identities
from tmm.passes.lift_rows import lift_rows
from tmm.passes.origin import all_nodes, sign_new_nodes
from tmm.passes.pack_rows import pack_rows
from tmm.passes.placements import PlacementOptions, find_placements
from tmm.passes.remove_dead_marks import DeadMarkOptions, remove_dead_marks
from tmm.passes.remove_evaluations import remove_evaluations
from tmm.passes.remove_taps import remove_taps

Result = TypeVar("Result")


class PassError(RuntimeError):
    """A pass failed on a graph; names the pass and the passes that ran before it."""


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph, what its extra inputs and outputs hold, and the seconds of each pass.

    ``evaluations`` is how many calls of the model were left out as those of an evaluation.

    Extra inputs are those of the reference, then ``row_inputs``; extra outputs those of the
    reference, then those of ``layout``.
    """

    module: GraphModule
    layout: PackedLayout
    reference: ReferenceEnds
    row_inputs: tuple[RowInput, ...]
    seconds: dict[str, float]
    evaluations: int = 0


Watch = Callable[[str, GraphModule, float], None]
"""Called with the name of each pass, the graph after it and the seconds that it took."""


def rewrite(
    module: GraphModule,
    options: ReductionOptions,
    probes: ProbeOptions | None = None,
    reference: Callable[[GraphModule], ReferenceOptions] | None = None,
    attention: AttentionOptions | None = None,
    *,
    placements: PlacementOptions | None = None,
    is_step_function: bool = False,
    keeps_unused: bool = True,
    watch: Watch | None = None,
) -> Rewritten:
    """Measure the marked tensors of ``module`` in a copy of it.

    With ``probes`` their gradients are measured as well; with ``reference``, which gives the
    options for the copy, they are compared; with ``attention`` attentions are measured; with
    ``placements`` each measurement tells what this rank has of its tensor. Of the graph of a step
    function calls of the model that are an evaluation are left out. ``keeps_unused`` tells that the
    graph will run as it stands, unused operations and all. The copy takes and returns what
    ``module`` does, and then what ``Rewritten`` says.
    Raises ``ValueError`` for a user's metric that cannot be traced and ``PassError`` for a fault
    of a pass.
    """
    seconds: dict[str, float] = {}

    def run(name: str, apply: Callable[[], Result]) -> Result:
        known = set(all_nodes(rewritten))
        started = time.perf_counter()
        try:
            result = apply()
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
        return result

    rewritten = copy_graph(module)
    if keeps_unused:
        join_identities(rewritten)
    evaluations = 0
    if is_step_function:
        evaluations = run("remove_evaluations", lambda: remove_evaluations(rewritten))
    unmeasured: tuple[tuple[Site, str], ...] = ()
    if not keeps_unused:
        selects = [options.select]
        if probes is not None:
            selects.append(probes.select)
        if reference is not None:
            selects.append(reference(rewritten).select)
        dead = DeadMarkOptions(options.modules, selects)
        unmeasured = run("remove_dead_marks", lambda: remove_dead_marks(rewritten, options=dead))
    if placements is not None:
        found = run("find_placements", lambda: find_placements(rewritten, options=placements))
        options = replace(options, share=found.share)
        attention = attention and replace(attention, placements=found)
        if probes is not None:
            of_gradients = find_gradient_shares(rewritten, placements=found)
            probes = replace(probes, share=of_gradients.__getitem__)
    unmeasured += run("insert_reductions", lambda: insert_reductions(rewritten, options=options))
    if attention is not None:
        unmeasured += run(
            "insert_attention", lambda: insert_attention(rewritten, options=attention)
        )
    ends = ReferenceEnds()
    if reference is not None:
        compared = reference(rewritten)
        ends, refused = run(
            "insert_reference", lambda: insert_reference(rewritten, options=compared)
        )
        unmeasured += refused
    row_inputs: tuple[RowInput, ...] = ()
    if probes is not None:
        row_inputs, refused = run("insert_probes", lambda: insert_probes(rewritten, options=probes))
        unmeasured += tuple((site, f"gradient: {reason}") for site, reason in refused)
    run("remove_taps", lambda: remove_taps(rewritten))
    run("lift_rows", lambda: lift_rows(rewritten))
    layout = run("pack_rows", lambda: pack_rows(rewritten, unmeasured=unmeasured))
    rewritten.recompile()
    return Rewritten(rewritten, layout, ends, row_inputs, seconds, evaluations)
