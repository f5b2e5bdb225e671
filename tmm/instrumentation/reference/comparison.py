"""What a monitored program knows of the reference that it is compared with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from tmm.core.families import BRANCH_FAMILIES
from tmm.core.records import Site
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.reference.batch_prefix import Batch
from tmm.instrumentation.reference.eager_comparison import Add, EagerComparison, Lose
from tmm.instrumentation.reference.follower import Follower
from tmm.instrumentation.reference.inputs import ReferenceInputs
from tmm.instrumentation.reference.kept_numbers import KeptNumbers
from tmm.instrumentation.reference.reads import watched_reads
from tmm.passes.findings import ReferenceEnds
from tmm.spec.reference import Reference


class Comparing:
    """Follows the reference through one forward pass after the other.

    ``batch`` is what the running one was given, where only some of its items are compared; ``lost``
    tells why the graph that runs cannot be compared this time; ``inputs`` are those of the
    reference where they are not the model's.
    """

    def __init__(
        self, reference: Reference, attribution: Attribution, add: Add, lose: Lose
    ) -> None:
        spec = attribution.plan.spec
        self.reference = reference
        self.batch: Batch | None = None
        self.lost = ""
        self.inputs = ReferenceInputs()
        self._unfollowed = ""
        self._attribution = attribution
        self._follower = Follower(reference)
        self._runs_branch = any(map(spec.measures, BRANCH_FAMILIES))
        self._samples = spec.reference_samples
        self._kept_numbers = KeptNumbers(attribution.root)
        self._eager = EagerComparison(attribution, self._follower, add, lose)

    @contextmanager
    def forward(self, inputs: object) -> Iterator[None]:
        """To be entered around a forward pass of the model."""
        if not self._runs_branch:
            yield
            return
        self._follower.begin(inputs)
        if reason := self._kept_numbers.begin():
            self._follower.lose(reason)
        for own, other in self.inputs.pairs:
            self._follower.pair(own, other)
        if self._samples is not None:
            self.batch = Batch.of(inputs)
        left_open = nullcontext() if self.batch is None else self.batch.left_open()
        try:
            with self._follower, watched_reads(), left_open:
                yield
        finally:
            self._look_back()
            self._follower.end()
            self.batch = None
            self.inputs.pairs = []

    def _look_back(self) -> None:
        """Learn of what the forward pass leaves on the model."""
        self._kept_numbers.end(has_read=self._follower.has_read)
        if self._follower.is_over:
            return
        self.reference.look()
        for tensor in self.reference.lacking():
            if self._follower.is_constant(tensor):
                self.reference.share(tensor)

    # Of graphs

    def inside_graph(self) -> AbstractContextManager[None]:
        """Keeps the reference from being followed where a graph computes it."""
        return self._follower.paused()

    def counterparts(
        self, ends: ReferenceEnds, inputs: Sequence[object], owner: torch.nn.Module
    ) -> list[torch.Tensor]:
        """What the reference's branch of a graph takes for these inputs."""
        follower, found = self._follower, []
        self._unfollowed = ""
        with self._follower.paused():
            for position in (*ends.parameters, *ends.inputs):
                tensor = inputs[position]
                assert isinstance(tensor, torch.Tensor)
                counterpart = follower.counterpart(tensor)
                if counterpart is None:
                    self._unfollowed = self._unfollowed or follower.why_unfollowed(tensor)
                elif counterpart.shape != tensor.shape:
                    self._unfollowed = self._unfollowed or (
                        f"a graph takes a tensor of shape {tuple(tensor.shape)}, in the reference"
                        f" of shape {tuple(counterpart.shape)}"
                    )
                    counterpart = None
                found.append(tensor.detach() if counterpart is None else counterpart)
        self.lost = follower.lost or self._unfollowed
        return found

    def take(
        self,
        ends: ReferenceEnds,
        inputs: Sequence[object],
        outputs: Sequence[Any],
        added: Sequence[torch.Tensor],
    ) -> None:
        """Take what the reference's branch of a graph gives to later ones, in ``added``."""
        follower = self._follower
        for position in ends.independent:
            follower.note_independent(outputs[position], is_constant=position in ends.constant)
        if not ends.is_part:
            return
        returned = [outputs[position] for position in ends.outputs]
        overwritten = [inputs[position] for position in ends.overwritten]
        if follower.is_over or self._unfollowed:
            follower.forget((returned, overwritten), self.lost)
        else:
            follower.pair(returned, added[: len(returned)])
            with torch.no_grad(), follower.paused():
                for own, other in zip(overwritten, added[len(returned) :], strict=True):
                    assert isinstance(own, torch.Tensor)
                    follower.overwritten(own, other)
        for position, reason in ends.lost_outputs:
            follower.forget(outputs[position], reason)
        for position, reason in ends.lost_inputs:
            follower.forget(inputs[position], reason)
        if ends.end:
            follower.lose(ends.end)

    @property
    def is_over(self) -> bool:
        """Whether the rest of the forward pass cannot be compared."""
        return bool(self._follower.lost)

    def end(self, reason: str) -> None:
        """Compare nothing in the rest of the forward pass."""
        self._follower.lose(reason)

    # Between graphs

    @property
    def is_repeating(self) -> bool:
        """Whether a module is running a second time, to be compared."""
        return self._eager.is_repeating

    def enter(
        self, module: torch.nn.Module, arguments: Any, keywords: Mapping[str, Any] | None
    ) -> None:
        """A module is called."""
        if self._runs_branch:
            self._eager.enter(module, arguments, keywords or {})

    def leave(self, module: torch.nn.Module, output: object) -> None:
        """A module has returned."""
        if self._runs_branch:
            self._eager.leave(module, output)

    def show(self, site: Site, tensor: torch.Tensor) -> None:
        """The program shows a tensor under a name."""
        if self._runs_branch:
            self._eager.show(site, tensor)

    def note_own_randomness(self) -> None:
        """A graph ran that draws random numbers of its own."""
        self._eager.note_own_randomness()
