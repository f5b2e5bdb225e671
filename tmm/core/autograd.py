"""What autograd tells of a forward pass: whether it may, and does, take part in a backward pass."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import get_gradient_edge

from tmm.core.torch_private import (
    current_graph_task_id,
    peek_interpreter_stack,
    will_engine_execute_node,
)

Node: TypeAlias = torch.autograd.graph.Node

_LEAF = "torch::autograd::AccumulateGrad"
_DEPTH = 4  # of containers and objects that are looked into
_ITEMS = 1000  # of each: lists of numbers may be long


def is_in_autograd_function() -> bool:
    """Whether an autograd function is running forward: it disables gradients, and has some.

    Such as a reentrant checkpoint, which runs its part once more in the backward pass.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx):
                return any(context.needs_input_grad)  # type: ignore[attr-defined]
        frame = frame.f_back  # type: ignore[assignment]
    return False


def reaches_parameters(module: torch.nn.Module) -> bool:
    """Whether the backward pass that is running goes on to any parameter of ``module``.

    True where nobody can tell, and for a module that has none to train.
    """
    # Neither compiled autograd nor a transform of torch.func knows.
    if torch.compiler.is_compiling() or peek_interpreter_stack():
        return True
    trains = False
    for parameter in module.parameters():
        if parameter.requires_grad:
            trains = True
            if _is_reached(parameter):
                return True
    return not trains


def _is_reached(parameter: torch.Tensor) -> bool:
    try:
        reached: bool = will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:
        return True  # torch's way to say that torch.autograd.grad was asked for this one
    return reached


def nearest_leaf(tensor: torch.Tensor) -> Node | None:
    """The node of the nearest parameter that ``tensor`` was computed of; of a leaf if of none.

    A parameter tells more: other leaves are what ``backward(inputs=...)`` is mostly asked for.
    """
    nodes: list[Node] = [get_gradient_edge(tensor).node]
    seen, other = set(nodes), None
    for node in nodes:
        if node.name() == _LEAF:
            if isinstance(node.variable, torch.nn.Parameter):  # type: ignore[attr-defined]
                return node
            other = other or node
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                nodes.append(source)
    return other


def goes_on_to(leaf: Node | None) -> bool:
    """Whether the backward pass that is running accumulates the gradient of ``leaf``.

    That of ``torch.autograd.grad`` does not. True where nobody can tell.
    """
    if leaf is None or torch.compiler.is_compiling() or peek_interpreter_stack():
        return True
    if current_graph_task_id() == -1:
        return True
    try:
        reached: bool = will_engine_execute_node(leaf)
    except RuntimeError:
        return False  # torch's way to say that torch.autograd.grad was asked for this one
    return reached


def tensors_within(value: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    """The tensors in containers and in attributes of objects."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    if depth == 0 or isinstance(value, (torch.nn.Module, type, str)):
        return
    if isinstance(value, dict):
        items: Collection[Any] = value.values()
    elif isinstance(value, (tuple, list, set, frozenset)):
        items = value
    else:
        items = getattr(value, "__dict__", {}).values()
    for item in islice(items, _ITEMS):
        yield from tensors_within(item, depth - 1)
