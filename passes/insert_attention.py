"""Measure the attentions of a graph, per head, without their matrices of probabilities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from torch.fx import GraphModule, Node

from tmm.core.metrics import builtin_reductions
from tmm.core.records import ATTENTION_MARK, AttentionRequest, Site
from tmm.kernels.ops import tap_attention
from tmm.passes.attention.find_calls import find_attention, shows_attention
from tmm.passes.attention.found import FoundAttention, Unmatched
from tmm.passes.attention.head_rows import Heads, why_unreadable
from tmm.passes.attention.multi_head import insert_parts
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.sharding import Placements
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.passes.graph.taps import call_of, site_of
from tmm.passes.graph.values import module_of, module_stack
from tmm.passes.remove_evaluations import is_evaluation
from tmm.passes.request import GraphRequest

_NO_CALL = "it follows a graph break, so that its number among the calls of the module is not known"
_LOOKED_AT = "tmm_attention"

SHOWN = AttentionRequest(builtin_reductions(("entropy",), is_complex=False), ())
"""What is measured of an attention that the program shows by a call."""


def insert_attention(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """After each attention that is asked for, insert the nodes that measure its heads.

    Afterwards rows that lie one after the other in a node are marked as such; the attentions
    themselves are as before. The calls that a module makes are numbered in order. Those that the
    program shows by a call are measured in any case. Finds the modules whose attention cannot be
    measured, with the reason.
    """
    found.unmeasured += _insert(module, request, found.placements, Counter())


def asks_attention(request: GraphRequest, module: GraphModule) -> bool:
    """Whether attentions are to be measured: by a rule, or since the program shows them."""
    return request.select_attention is not None or shows_attention(module)


def _requests(request: GraphRequest, name: str | None) -> tuple[AttentionRequest, ...]:
    select = request.select_attention
    return () if name is None or select is None else select(name)


def _insert(
    module: GraphModule,
    request: GraphRequest,
    placements: Placements | None,
    calls: Counter[tuple[tuple[str, str], ...]],
) -> Iterator[tuple[Site, str]]:
    bodies = {call: body for call, body in nested_calls(module) if returns_body_outputs(call)}
    for nesting, body in nested_calls(module):
        if nesting not in bodies:
            yield from _refuse(body, request, f"inside {nesting.target}")
    attentions = {_caller(attention): attention for attention in find_attention(module)}
    for node in list(module.graph.nodes):
        if node in bodies:
            yield from _insert(bodies[node], request, placements, calls)
        elif node.target is tap_attention:
            yield from _shown(node, attentions[node], request, placements)
        elif (attention := attentions.get(node)) is not None and not is_evaluation(node):
            call = call_of(node)
            # Without a call, it is the module's whose frame was left and is gone on with.
            name = "" if call is None else request.modules.get(module_of(call))
            requests = _requests(request, name)
            if name is None or not requests or node.meta.get(_LOOKED_AT):
                continue
            node.meta[_LOOKED_AT] = True
            if call is None and not request.begins_forward:
                yield Site(name, ATTENTION_MARK), _NO_CALL
                continue
            if isinstance(attention, Unmatched) and not attention.is_numbered:
                yield Site(name, ATTENTION_MARK), attention.reason
                continue
            # Of this call of the module: with those of the modules that called it.
            place = tuple((key, path) for key, (path, _) in module_stack(node).items())
            site = Site(name, f".call_{calls[place]}" if calls[place] else "")
            calls[place] += 1
            if isinstance(attention, Node):
                attention = insert_parts(module.graph, attention, site)
            if isinstance(attention, FoundAttention) and (reason := why_unreadable(attention)):
                attention = Unmatched(node, reason)
            if isinstance(attention, Unmatched):
                yield Site(name, f"{site.path}{ATTENTION_MARK}"), attention.reason
            else:
                for asked in requests:
                    Heads(attention, site, asked, placements, attention.position).insert()


def _refuse(module: GraphModule, request: GraphRequest, reason: str) -> Iterator[tuple[Site, str]]:
    """Name the attentions of a nested graph that has no place for rows."""
    for attention in find_attention(module):
        call = call_of(_caller(attention))
        name = None if call is None else request.modules.get(module_of(call))
        if name is not None and _requests(request, name):
            yield Site(name, ATTENTION_MARK), reason
    for _, body in nested_calls(module):
        yield from _refuse(body, request, reason)


def _shown(
    mark: Node,
    attention: FoundAttention | Unmatched | Node,
    request: GraphRequest,
    placements: Placements | None,
) -> Iterator[tuple[Site, str]]:
    """Measure an attention that the program shows by a call."""
    site = site_of(mark, request.modules)
    if site is None or mark.meta.get(_LOOKED_AT):
        return
    mark.meta[_LOOKED_AT] = True
    assert isinstance(attention, FoundAttention)
    if reason := why_unreadable(attention):
        yield site, reason
    else:
        Heads(attention, site, SHOWN, placements, attention.position).insert()


def _caller(attention: FoundAttention | Unmatched | Node) -> Node:
    return attention if isinstance(attention, Node) else attention.caller
