"""Partials on a CPU, by ``merge.cpp``, which registers the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tmm.kernels.summarize.host import load_operators


def merge_on_host(parts: Sequence[torch.Tensor], layout: Sequence[int]) -> torch.Tensor | None:
    """What ``tmm::merge`` gives, in C++; None where no compiler works, which is warned of once."""
    if not load_operators():
        return None
    row: torch.Tensor = torch.ops.tmm.merge.default(list(parts), list(layout))
    return row
