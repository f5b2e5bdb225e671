"""All values that a step has of one key, joined to what is recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tmm.core.metrics import Aggregate


def join(key: str, aggregate: Aggregate, parts: Sequence[torch.Tensor]) -> dict[str, float]:
    """Recorded key to number, from all elements of ``parts``; empty if there are none.

    Named aggregates are computed in float64. A function gets the elements, one-dimensional and in
    their own dtype. It gives one number, or a mapping from suffixes of the key to numbers, such as
    ``{"[min]": a, "[max]": b}``.

    Raises:
        ValueError: the function fails, or gives something else.
    """
    values = parts[0].reshape(-1) if len(parts) == 1 else torch.cat([p.reshape(-1) for p in parts])
    if values.numel() == 0:
        return {}
    if isinstance(aggregate, str):
        values = values.to(torch.float64)
        if values.numel() == 1:  # as most are, and each call of torch takes microseconds
            return {key: abs(float(values)) if aggregate == "norm" else float(values)}
        return {key: float(getattr(values, aggregate)())}
    try:
        joined: Any = aggregate(values)
        named = joined if isinstance(joined, Mapping) else {"": joined}
        return {f"{key}{suffix}": float(number) for suffix, number in named.items()}
    except Exception as error:
        raise ValueError(
            f"the aggregate of {key!r} failed on its {values.numel()} values: {error}"
        ) from error
