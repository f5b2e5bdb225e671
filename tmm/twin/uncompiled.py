"""The backend of monitored steps of a model that is not compiled: each operation as it stands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from tmm.passes.nesting import nested_calls, returns_body_outputs


def eager(module: GraphModule, inputs: Sequence[object]) -> Callable[..., Any]:
    """Run a traced graph like the program that it was traced from.

    Unlike torch's own eager backend, checkpointing keeps the random numbers of what it repeats.
    """
    _restore_checkpoints(module)
    return module.forward


def _restore_checkpoints(module: GraphModule) -> None:
    for call, body in list(nested_calls(module)):
        _restore_checkpoints(body)
        if returns_body_outputs(call):
            call.target = _checkpoint
    module.recompile()


def _checkpoint(body: GraphModule, *arguments: torch.Tensor, **options: Any) -> Any:
    if (context := body.meta.get("_checkpoint_context_fn")) is not None:
        options["context_fn"] = context
    return checkpoint(body, *arguments, **options)
