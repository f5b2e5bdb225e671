"""Tell which traced tensors are one tensor where the graph runs, though the trace copied it."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

from tmm.passes.findings import GraphFindings
from tmm.passes.graph.edits import SHARED_MEMORY, storages
from tmm.passes.graph.subgraphs import nested_calls
from tmm.passes.request import GraphRequest

_DROPOUTS = (functional.dropout, torch.dropout, torch.ops.aten.dropout.default)
"""The only operations whose traced result is a copy and whose real one may be the input."""


def join_identities(module: GraphModule, request: GraphRequest, found: GraphFindings) -> None:
    """Have ``storages`` count a dropout that drops nothing and what it was given as one memory.

    For a graph that runs as it stands, where such a dropout gives back its input; a compiler
    copies, as Dynamo's trace does. The graph stays as it is.
    """
    joined: dict[int, int] = {}
    _join(module, joined)
    if joined:
        _note(module, joined)


def _join(module: GraphModule, joined: dict[int, int]) -> None:
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in _DROPOUTS and _drops_nothing(node):
            (given,), (result,) = storages(node.all_input_nodes), storages([node])
            if given != result:
                joined[result] = joined.get(given, given)
    for _, body in nested_calls(module):
        _join(body, joined)


def _note(module: GraphModule, joined: dict[int, int]) -> None:
    module.meta[SHARED_MEMORY] = joined
    for _, body in nested_calls(module):
        _note(body, joined)


def _drops_nothing(node: Node) -> bool:
    given = dict(zip(("input", "p", "training", "inplace"), node.args, strict=False)) | node.kwargs
    probability = given.get("p", 0.5)
    is_training = given.get("training", given.get("train", True))
    return is_training is False or (isinstance(probability, (int, float)) and probability == 0)
