"""Leave out of a step function's graph the calls of a model that are those of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from tmm.core.torch_private import enter_inference_mode, exit_inference_mode, set_grad_enabled
from tmm.passes.findings import GraphFindings
from tmm.passes.graph.provenance import all_nodes
from tmm.passes.graph.subgraphs import nested_calls
from tmm.passes.graph.taps import is_mark
from tmm.passes.graph.values import module_of, module_stack
from tmm.passes.request import GraphRequest

_EVALUATION = "tmm_evaluation"
_PLACES = ("placeholder", "get_attr", "output")


@dataclass(eq=False)
class _Call:
    """A call of a module by the step function: its nodes, and all modules that ran in it."""

    nodes: list[Node] = field(default_factory=list)
    modules: set[int] = field(default_factory=set)
    has_gradients: bool = False


def remove_evaluations(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Erase the marks in calls without gradients, where the same modules are called with them, too.

    A call is one that the step function itself makes; as of a teacher that is the model itself, in
    ``torch.no_grad()``. What runs without gradients only, such as a frozen encoder, stays.
    Afterwards ``is_evaluation`` tells the nodes of those calls. Finds the number of such
    calls, in the graph of a step function.
    """
    calls = _calls(module)
    trained = [call for call in calls if call.has_gradients]
    evaluations = [
        call
        for call in calls
        if not call.has_gradients and any(call.modules & other.modules for other in trained)
    ]
    bodies: dict[Node, list[GraphModule]] = {}
    for caller, body in nested_calls(module):
        bodies.setdefault(caller, []).append(body)
    for call in evaluations:
        for node in call.nodes:
            _leave_out(node)
            for body in bodies.get(node, ()):
                for inner in list(all_nodes(body)):
                    _leave_out(inner)
    found.evaluations = len(evaluations)


def runs_without_gradients(module: GraphModule) -> bool:
    """Whether the graph calls modules, and none of them with gradients."""
    calls = _calls(module)
    return bool(calls) and not any(call.has_gradients for call in calls)


def is_evaluation(node: Node) -> bool:
    """Whether ``node`` lies in a call that is left out."""
    return bool(node.meta.get(_EVALUATION))


def _calls(module: GraphModule) -> list[_Call]:
    calls: dict[str, _Call] = {}
    for node, has_gradients in _with_modes(module):
        stack = list(module_stack(node))
        if stack and node.op not in _PLACES:
            call = calls.setdefault(stack[0], _Call())
            call.nodes.append(node)
            call.modules |= {module_of(key) for key in stack}
            call.has_gradients |= has_gradients
    return list(calls.values())


def _with_modes(module: GraphModule) -> Iterator[tuple[Node, bool]]:
    """Each node, and whether gradients are enabled where it runs; at first they are."""
    enabled, inferences = True, set[Node]()
    for node in module.graph.nodes:
        if node.target is set_grad_enabled:
            enabled = bool(node.args[0])
        elif node.target is enter_inference_mode and node.args[0]:
            inferences.add(node)
        elif node.target is exit_inference_mode:
            inferences.discard(node.args[0])
        yield node, enabled and not inferences


def _leave_out(node: Node) -> None:
    node.meta[_EVALUATION] = True
    if is_mark(node):
        marked = node.args[0]
        assert isinstance(marked, Node)
        node.replace_all_uses_with(marked)
        node.graph.erase_node(node)
