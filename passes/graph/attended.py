"""Which tensors nothing but attentions read."""

from __future__ import annotations

import operator

import torch
from torch.fx import Node
from torch.nn import functional

from tmm.passes.graph.dropout_functions import ATTENTIONS
from tmm.passes.graph.provenance import sites_of
from tmm.passes.graph.values import value_of
from tmm.passes.metrics.gradient_probe import probe

_VIEWS = (
    *("view", "unflatten", "transpose", "permute", "movedim", "unsqueeze", "squeeze", "detach"),
    *("split", "chunk", "unbind", "narrow", "select"),
    *(torch.unflatten, torch.transpose, torch.permute, torch.movedim, torch.unsqueeze),
    *(torch.squeeze, torch.split, torch.chunk, torch.unbind, torch.narrow, torch.select),
    operator.getitem,
)
"""What gives a view of its first argument, or several."""


def is_only_attended(tensor: Node) -> bool:
    """Whether a tensor is a product that only attentions read, and that a backward pass will read.

    Libraries compute both, so that no kernel is there in which its sums could be taken, and it is
    kept until then anyway. ``tensor`` may be what it is measured by: detached, or behind a probe.
    """
    while tensor.target == "detach" or tensor.target is probe:
        tensor = tensor.all_input_nodes[0]
    example = value_of(tensor)
    if tensor.target is not functional.linear or not example.requires_grad:
        return False
    is_attended, pending = False, [tensor]
    while pending:
        for user in pending.pop().users:
            if user.target in ATTENTIONS:
                is_attended = True
            elif user.target in _VIEWS or user.target is probe:
                pending.append(user)
            elif not sites_of(user):
                return False
    return is_attended
