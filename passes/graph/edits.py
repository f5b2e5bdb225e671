"""Small changes of graphs that several passes make: further inputs and outputs, examples."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from tmm.core.torch_private import FakeTensor, without_source
from tmm.core.wrapped_tensors import is_wrapper, like_wrapper
from tmm.passes.graph.values import local_example, set_value, value_of

SHARED_MEMORY = "tmm_shared_memory"
"""Where a graph keeps which traced memory is another's where it runs, see ``join_identities``."""


def add_body_input(call: Node, body: GraphModule, value: Node, name: str) -> Node:
    """Make ``value`` an input of the nested graph ``body`` that ``call`` runs."""
    call.args = (*call.args, value)
    return add_placeholder(body, name, value_of(value))


def add_body_output(call: Node, body: GraphModule, output: Node) -> int:
    """Make ``output`` a further output of a nested graph; gives its position in the result."""
    returning = body.graph.output_node()
    (returned,) = returning.args
    assert isinstance(returned, (tuple, list))
    returning.args = ((*returned, output),)
    set_value(call, (*value_of(call), value_of(output)))
    body.recompile()
    return len(returned)


def add_placeholder(module: GraphModule, name: str, example: object) -> Node:
    """A further input of a graph, after the others."""
    first = next(node for node in module.graph.nodes if node.op != "placeholder")
    with module.graph.inserting_before(first):
        node = module.graph.placeholder(name)
    node.target = node.name  # code has both, and the name may be that of a later node
    without_source(node)
    set_value(node, example)
    return node


def example_like(example: object) -> object:
    """A traced tensor of the same shape and dtype that shares nothing with it."""
    if is_wrapper(example):
        return like_wrapper(example, example_like)
    if not isinstance(example, FakeTensor) or example.is_nested:
        return example
    with example.fake_mode, torch.no_grad():
        return torch.empty_like(example, requires_grad=False)


def written(module: GraphModule) -> set[int]:
    """The memory that a graph writes to."""
    return storages(
        node
        for node in module.graph.nodes
        if isinstance(example := local_example(value_of(node)), FakeTensor) and example._version
    )


def storages(nodes: Iterable[Node]) -> set[int]:
    """The memory that traced tensors lie in."""
    found = set()
    for node in nodes:
        example = local_example(value_of(node))
        if isinstance(example, FakeTensor) and example.layout is torch.strided:
            storage = example.untyped_storage()._cdata
            owner = node.graph.owning_module
            joined = {} if owner is None else owner.meta.get(SHARED_MEMORY, {})
            found.add(joined.get(storage, storage))
    return found
