"""What a user may log into a step."""

from __future__ import annotations

import torch

from tmm.core.metrics import AGGREGATE_NAMES


def check_logged(caller: str, key: object, aggregate: object) -> None:
    """Raise ``ValueError`` for a key or an aggregate under which nothing can be logged."""
    if not isinstance(key, str) or not key:
        raise ValueError(f"{caller}: the key {key!r} is not text")
    if not callable(aggregate) and aggregate not in AGGREGATE_NAMES:
        raise ValueError(
            f"{caller}({key!r}): aggregate={aggregate!r} is neither callable nor one of"
            f" {', '.join(AGGREGATE_NAMES)}"
        )


def one_number(caller: str, key: str, value: object) -> torch.Tensor:
    """``value`` as a tensor of one element; raises ``TypeError`` or ``ValueError`` for others."""
    try:
        number = (
            value
            if isinstance(value, torch.Tensor)
            else torch.as_tensor(value, dtype=torch.float64, device="cpu")
        )
    except (TypeError, ValueError) as error:
        raise TypeError(f"{caller}({key!r}): {value!r} is not a number") from error
    if number.numel() != 1:
        raise ValueError(
            f"{caller}({key!r}): the value has shape {tuple(number.shape)}, not one number;"
            " log_tensor joins all elements"
        )
    return number
