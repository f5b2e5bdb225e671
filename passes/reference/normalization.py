"""Normalizations over a batch, and their running statistics."""

from __future__ import annotations

from torch.fx import Node
from torch.nn import functional

_BATCH_NORM = (
    *("input", "running_mean", "running_var", "weight", "bias"),
    *("training", "momentum", "eps"),
)


def mixes_items(node: Node) -> bool:
    """Whether a normalization takes its statistics over the batch."""
    if node.target is not functional.batch_norm:
        return False
    arguments = dict(zip(_BATCH_NORM, node.args, strict=False)) | node.kwargs
    return bool(arguments.get("training", False))


def without_statistics(node: Node) -> None:
    """Let a normalization of a copy not touch running statistics."""
    is_batch_norm = node.target is functional.batch_norm
    names, training = _BATCH_NORM, "training" if is_batch_norm else "use_input_stats"
    arguments = dict(zip((*names[:5], training, *names[6:]), node.args, strict=False))
    arguments |= node.kwargs
    if arguments.get(training, node.target is functional.instance_norm):
        arguments |= {"running_mean": None, "running_var": None}
    node.args, node.kwargs = (), arguments
