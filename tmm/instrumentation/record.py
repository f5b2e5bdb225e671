"""Values from the middle of a model."""

from __future__ import annotations

import torch

from tmm.core.metrics import Aggregate
from tmm.instrumentation.show import show_value


def record(name: str, tensor: torch.Tensor, aggregate: Aggregate = "mean") -> None:
    """Record ``tensor`` under the key ``name``; call it in any ``forward`` of a monitored model.

    In a compiled program the value is measured inside the graph. Outside of monitored steps
    nothing happens, and the compiled program holds no trace of the call.

    Args:
        name: the key, as it is; it must not start with the name of a family, such as
            ``activation/``.
        tensor: of any shape and dtype; of complex numbers, the magnitudes are recorded.
        aggregate: joins all elements that a step records under the name: ``"mean"``, ``"sum"``,
            ``"min"``, ``"max"`` or a callable on the one-dimensional tensor of all elements.

    Raises:
        ValueError: in a monitored step, for a name or an aggregate that cannot be, or for
            something that is not a tensor.
    """
    show_value(name, tensor, aggregate, any_family=False)
