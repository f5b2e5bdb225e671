"""Models that are not compiled: why some are traced even so, and how they do not notice.

Most run as they are (``tmm.instrumentation.untraced``). What only a graph tells is found by
tracing them, with a backend that runs each operation as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from tmm.core.dynamo_private import answers
from tmm.core.families import ATTENTION, BRANCH_FAMILIES
from tmm.core.replacement import Replacement
from tmm.passes.graph.subgraphs import nested_calls, returns_body_outputs
from tmm.spec.ranks import Ranks
from tmm.spec.spec import Spec

_ANSWER = "tracing_state_functions"


def why_traced(spec: Spec, place: Ranks) -> str | None:
    """What a spec asks of a model that is not compiled which only a graph tells; None if nothing.

    It has words for ``tmm.explain``.
    """
    reasons = []
    if spec.measures(ATTENTION.name):
        reasons.append("tmm.attention")
    if any(map(spec.measures, BRANCH_FAMILIES)):
        reasons.append("comparing it with a reference")
    if place.tensor_parallel is not None:
        reasons.append("telling which part of a tensor a rank has")
    return ", ".join(reasons) or None


class EagerAnswers:
    """Lets a program that is traced be told what it is told when it is not.

    Code asks whether it is being compiled, and takes another way then.
    """

    def __init__(self) -> None:
        self._given: Replacement | None = None

    def give(self) -> None:
        """From now on, until ``stop``; Dynamo traces one program at a time."""
        if self._given is None:
            own = getattr(answers, _ANSWER)
            self._given = Replacement(answers, _ANSWER, lambda: _as_when_run(own()))

    def stop(self) -> None:
        """Let Dynamo answer again."""
        if self._given is not None:
            self._given.restore()
            self._given = None


def _as_when_run(known: dict[Any, Any]) -> dict[Any, Any]:
    return {question: None if answer is None else False for question, answer in known.items()}


def in_fused_layers(modules: Iterable[torch.nn.Module]) -> set[torch.nn.Module]:
    """Layers that torch may compute as a whole, with all inside: if none of them has a hook.

    It does not while they train.
    """
    layers = [module for module in modules if isinstance(module, torch.nn.TransformerEncoderLayer)]
    return {inner for layer in layers if not layer.training for inner in layer.modules()}


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
