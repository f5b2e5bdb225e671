"""Rows on their way to the recorder, in the middle of the user's program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tmm.core.keys import parts_of
from tmm.core.torch_private import is_batched
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.recorder import GradientSink, Recorder
from tmm.runtime.key_binding import Binding


class HandingOver:
    """Hands rows over; the program goes on if that fails."""

    def __init__(self, attribution: Attribution, recorder: Recorder) -> None:
        self._attribution = attribution
        self._recorder = recorder

    def attempt(self, measure: Callable[..., None], *arguments: Any) -> None:
        """Measure something; a fault costs the step its record."""
        try:
            measure(*arguments)
        except Exception as error:
            self._recorder.note_failure(error)

    def give(self, sink: GradientSink, binding: Binding, outputs: Sequence[torch.Tensor]) -> None:
        """Give rows to ``sink``, such as the recorder's ``add``."""
        self.attempt(self._give, sink, binding, outputs)

    def _give(self, sink: GradientSink, binding: Binding, outputs: Sequence[torch.Tensor]) -> None:
        if any(map(is_batched, outputs)):
            self.refuse_batched(binding)
        else:
            sink(binding, outputs)

    def refuse_batched(self, binding: Binding) -> None:
        """Say of the sites that they have no rows, as each would be of many passes."""
        for group in binding.groups:
            for site in group.sites:
                self._attribution.unmeasured[parts_of(site)[1]] = "inside torch.func.vmap"
