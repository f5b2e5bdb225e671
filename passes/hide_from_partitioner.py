"""Let Inductor part forward and backward pass as if nothing were measured.

What it keeps for the backward pass, and what it computes once more, depends on what reads a tensor,
where in the graph, and whether that can be fused. With our operators in its sight it would keep
other tensors than those of the model's own program, and run other kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from tmm.passes.graph.copy import copy_graph

VERSION = "1"
"""Of what is done here: part of the key under which Inductor keeps what it compiled."""

_NAMESPACE = "tmm"


@dataclass(frozen=True)
class Hidden:
    """A joint graph as it was, and the names of the nodes of it that were taken out.

    ``outputs`` tell by their place which outputs of the forward pass these are.
    """

    whole: GraphModule
    names: frozenset[str]
    outputs: Mapping[int, str]


def hide_measuring(joint: GraphModule, forward_outputs: int) -> Hidden:
    """Take what only measures the forward pass out of a joint graph.

    That is what our operators compute, and what nothing but they reads. The first
    ``forward_outputs`` outputs of the graph are those of the forward pass; None takes the place of
    those that were measured.
    """
    whole, output = copy_graph(joint), joint.graph.output_node()
    hidden = _measuring(joint.graph, forward_outputs)
    names = frozenset(node.name for node in hidden)
    returned = _returned(joint.graph)
    outputs = {place: node.name for place, node in enumerate(returned) if node in hidden}
    output.args = ([None if node in hidden else node for node in returned],)
    for node in hidden:  # readers first
        joint.graph.erase_node(node)
    joint.recompile()
    return Hidden(whole, names, outputs)


def show_measuring(forward: GraphModule, hidden: Hidden) -> None:
    """Put it back where it stood, in the graph of the forward pass."""
    graph, whole = forward.graph, hidden.whole.graph
    own = _same_nodes(whole, graph, hidden)
    taken_out = (node for node in whole.nodes if node.name in hidden.names)
    missing = _with_sources(taken_out, known=own)  # some sources only the backward pass has
    order = {node: place for place, node in enumerate(graph.nodes)}
    behind, last = next(iter(graph.nodes)), -1  # the last of what comes before, and its place
    for node in whole.nodes:
        if node in missing:
            if node.op == "get_attr":
                setattr(forward, str(node.target), getattr(hidden.whole, str(node.target)))
            with graph.inserting_after(behind):
                behind = own[node] = graph.node_copy(node, own.__getitem__)
        elif node in own and order[own[node]] > last:
            behind, last = own[node], order[own[node]]
    shown = {node.name: own[node] for node in missing}
    returned = _returned(graph)
    for place, name in hidden.outputs.items():
        returned[place] = shown[name]
    graph.output_node().args = (returned,)
    forward.recompile()


def _same_nodes(whole: Graph, forward: Graph, hidden: Hidden) -> dict[Node, Node]:
    """What a joint graph has in common with the graph of its forward pass."""
    named = {node.name: node for node in forward.nodes}
    found: dict[Node, Node] = {}
    for node in whole.nodes:
        same = named.get(node.name) if node.name not in hidden.names else None
        if same is not None and (same.op, same.target) == (node.op, node.target):
            found[node] = same
    return found


def _measuring(graph: Graph, forward_outputs: int) -> dict[Node, None]:
    """The nodes of a forward pass from which nothing but measurements comes, the last one first."""
    output, returned = graph.output_node(), _returned(graph)
    forward = _with_sources(node for node in returned[:forward_outputs] if isinstance(node, Node))
    from_ours: set[Node] = set()
    for node in graph.nodes:
        if _is_ours(node) or not from_ours.isdisjoint(node.all_input_nodes):
            from_ours.add(node)
    found: dict[Node, None] = {}
    for node in reversed(graph.nodes):
        if node.op == "call_function" and node in forward:
            readers = set(node.users)
            if node in from_ours:
                readers.discard(output)
            if readers <= found.keys() and (readers or node in from_ours):
                found[node] = None
    return found


def _with_sources(nodes: Iterable[Node], known: Collection[Node] = ()) -> set[Node]:
    """These nodes and all that they are computed from, as far back as to what is known."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(source for source in node.all_input_nodes if source not in known)
    return found


def _returned(graph: Graph) -> list[Any]:
    """What a graph returns."""
    (returned,) = graph.output_node().args
    assert isinstance(returned, (tuple, list))
    return list(returned)


def _is_ours(node: Node) -> bool:
    """Whether a node calls an operator of ours, if only through one that makes it functional."""
    called = (node.target, *node.args[:1]) if node.op == "call_function" else ()
    return any(getattr(target, "namespace", None) == _NAMESPACE for target in called)
