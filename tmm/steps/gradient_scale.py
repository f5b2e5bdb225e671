"""By what gradients differ from those of the loss of the whole batch."""

from __future__ import annotations

import torch
from torch.amp.grad_scaler import GradScaler

from tmm.kernels.dense import packed_dtype
from tmm.steps.optimizers import OpenCollector, WatchedScaler


class GradientScale:
    """The factors of the scalers that are watched, and the mean over ranks and micro-batches.

    ``averaged`` is of how many losses, of ranks or of a pipeline's micro-batches, that of the whole
    batch is the mean.
    """

    def __init__(self, averaged: float = 1.0) -> None:
        self.scalers: list[WatchedScaler] = []
        self._averaged = averaged

    @property
    def is_scaled(self) -> bool:
        """Whether gradients are to be multiplied with a factor."""
        return bool(self.scalers) or self._averaged != 1.0

    def factor(self, device: torch.device) -> torch.Tensor | None:
        """What to multiply gradients with, one element of ``packed_dtype``; None for 1."""
        factor = self.scalers[0].factor(device) if self.scalers else None
        if self._averaged == 1.0:
            return factor
        if factor is None:
            factor = torch.ones((), dtype=packed_dtype(device), device=device)
        return factor / self._averaged

    def knows(self, scaler: GradScaler) -> bool:
        """Whether the factor of a scaler is taken out already."""
        return any(watched.scaler is scaler for watched in self.scalers)

    def watched(self, scaler: GradScaler, collector: OpenCollector) -> WatchedScaler:
        """What watches a scaler, from now on if it did not before."""
        for watched in self.scalers:
            if watched.scaler is scaler:
                return watched
        self.scalers.append(WatchedScaler(scaler, collector))
        return self.scalers[-1]

    def close(self) -> None:
        """Leave all scalers as they were."""
        for scaler in self.scalers:
            scaler.remove()
        self.scalers.clear()


def check_scaler(scaler: object) -> None:
    """Raise ``TypeError`` for what is neither a scaler nor None."""
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler={scaler!r} is not a torch.amp.GradScaler")
