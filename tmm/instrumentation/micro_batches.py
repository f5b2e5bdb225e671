"""Which calls of a pipeline's stages are the forward passes of micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tmm.core.replacement import Replacement

_FORWARD = "forward_one_chunk"
"""What a schedule calls to run a micro-batch through a stage."""

_WEIGHTS = "backward_weight_one_chunk"
"""What it calls for gradients of parameters, where it computes those of inputs before."""


class MicroBatches:
    """Knows whether a schedule runs a micro-batch through one of its stages.

    It calls them at other times, too: before the first step, and where it goes from training to
    evaluation or back, it runs one forward and one backward pass to learn of shapes, of which most
    stages are given memory that nobody has written to. ``losses`` is of how many losses of
    micro-batches that of the whole batch is the mean. ``repeats_backward`` tells that gradients of
    activations come by once more, where a backward pass is run in two parts; ``has_split`` that
    one was.
    """

    def __init__(self, stages: Sequence[Any], losses: int) -> None:
        self.losses = losses
        self.repeats_backward = self.has_split = False
        self._running: Any = None
        self._stages = tuple(stages)
        self._replaced: list[Replacement] = []

    @property
    def is_running(self) -> bool:
        """Whether a stage runs a micro-batch."""
        return self._running is not None

    @property
    def is_trained(self) -> bool:
        """Whether the schedule is going to run the backward pass of the one that runs, too.

        In several parts, perhaps, none of which autograd sees to go from outputs to parameters.
        """
        return self.is_running and bool(self._running.has_backward)

    def follow(self) -> None:
        """Know of what the stages run from now on."""
        for stage in self._stages:
            run = partial(self._run, stage, getattr(stage, _FORWARD))
            self._replaced.append(Replacement(stage, _FORWARD, run))
            if not stage.is_first:  # which runs its backward pass there, all at once
                repeat = partial(self._repeat, getattr(stage, _WEIGHTS))
                self._replaced.append(Replacement(stage, _WEIGHTS, repeat))

    def leave(self) -> None:
        """Leave the stages as they were."""
        while self._replaced:
            self._replaced.pop().restore_if_it_stands()

    def _run(self, stage: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outer, self._running = self._running, stage
        try:
            return forward(*args, **kwargs)
        finally:
            self._running = outer

    def _repeat(self, backward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.repeats_backward = self.has_split = True
        try:
            return backward(*args, **kwargs)
        finally:
            self.repeats_backward = False
