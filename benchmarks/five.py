"""The five statistics of a tensor, as others than tmm compute them. It imports torch alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from benchmarks.workloads import FIVE_METRICS

METRICS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean": lambda x: x.mean(),
    "std": lambda x: x.std(),
    "rms": lambda x: x.square().mean().sqrt(),
    "absmax": lambda x: x.abs().max(),
    "zero_fraction": lambda x: (x == 0).float().mean(),
}
"""One function for each."""


def five(x: torch.Tensor) -> torch.Tensor:
    """The five statistics of a tensor as one would write them by hand; shape (5,)."""
    x = x.detach().float()
    return torch.stack(
        [x.mean(), x.std(), x.square().mean().sqrt(), x.abs().amax(), (x == 0).float().mean()]
    )


def named(names: Iterable[str], rows: torch.Tensor) -> Mapping[str, float]:
    """Rows of ``five``, one per name, as numbers."""
    return {
        f"{name or '[root module]'}/{statistic}": value
        for name, row in zip(names, rows.tolist(), strict=True)
        for statistic, value in zip(FIVE_METRICS, row, strict=True)
    }


def has_output(module: nn.Module) -> bool:
    """Whether a module is called at all: lists of modules are not."""
    return not isinstance(module, (nn.ModuleList, nn.ModuleDict))


def measured_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The modules with an output, by name."""
    return {name: child for name, child in module.named_modules() if has_output(child)}
