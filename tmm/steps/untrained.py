"""Parameters that are not trained, told at the first step of a start, and where that changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tmm.core.keys import STARTED, untrained_key
from tmm.runtime.step_collector import StepCollector
from tmm.steps.without_rows import FROZEN, NO_GRADIENT, NOT_HELD

_REASONS = {FROZEN: "frozen", NOT_HELD: "without_optimizer", NO_GRADIENT: "without_gradient"}
_FAMILY = "gradient of "


class Untrained:
    """Notes 1 for each parameter that is not trained, by the reason, and 0 where that is over."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}
        self._state: object = None
        self._has_started = False

    def note(
        self,
        collector: StepCollector,
        names: Mapping[torch.nn.Parameter, str],
        why: Callable[[], Mapping[str, str]],
    ) -> None:
        """Look at a step whose optimizers have stepped.

        ``names`` are the parameters of the model; ``why`` gives those without rows, such as
        ``"gradient of 0.weight"``, with the reason.
        """
        state = tuple((name, parameter.requires_grad) for parameter, name in names.items())
        if state == self._state:
            return
        self._state = state
        found = {
            text.removeprefix(_FAMILY): _REASONS[reason]
            for text, reason in why().items()
            if text.startswith(_FAMILY) and reason in _REASONS
        }
        # What had gradients before has rows, and is frozen all the same.
        found |= {name: "frozen" for name, is_trained in state if not is_trained}
        begins, self._has_started = not self._has_started, True
        keys = {STARTED: 1.0} if begins else {}
        keys |= {untrained_key(reason, name): 0.0 for name, reason in self._told.items()}
        keys |= {untrained_key(reason, name): 1.0 for name, reason in found.items()}
        self._told = found
        if keys:
            values = torch.tensor(list(keys.values()), dtype=torch.float64, device="cpu")
            collector.add_numbers(tuple(keys), values, "max")
