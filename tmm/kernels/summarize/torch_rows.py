"""Rows of partial sums by torch operations: eagerly, or compiled for an accelerator."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tmm.kernels.dense import accumulation_dtype, packed_dtype

IDENTITIES = {"minimum": float("inf"), "maximum": float("-inf"), "absmax": 0.0}
"""Columns that do not add up, and what a tensor without elements has there."""


def summarize_with_torch(x: torch.Tensor, columns: tuple[str, ...]) -> torch.Tensor:
    """The row of a real tensor of any shape by plain operations: what other kernels must equal."""
    if x.numel() == 0:
        row = torch.zeros(len(columns), dtype=packed_dtype(x.device), device=x.device)
        for name, value in IDENTITIES.items():
            if value and name in columns:
                row.select(0, columns.index(name)).fill_(value)  # unlike a copy, waits for nothing
        return row
    return summarize_rows(columns, x.reshape(1, -1))


def summarize_rows(columns: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """The row of ``x``, of shape (rows, length), by one reduction per row and column.

    Rows are reduced in the accumulation dtype, and merged in float64. Extremes as well, though
    they do not need it: Inductor cuts the reduction of a whole tensor into pieces that it counts in
    32 bits, and that read the tensor once more.
    """
    rows, length = x.shape
    wide = packed_dtype(x.device)
    values = x.to(accumulation_dtype(x.dtype))

    def total(per_element: torch.Tensor) -> torch.Tensor:
        return per_element.sum(1).to(wide).sum()

    is_whole = x.is_cpu and rows == 1  # one reduction is faster there

    def largest(per_element: torch.Tensor) -> torch.Tensor:
        return (per_element if is_whole else per_element.amax(1)).amax()

    def least(per_element: torch.Tensor) -> torch.Tensor:
        return (per_element if is_whole else per_element.amin(1)).amin()

    reductions: dict[str, Callable[[], torch.Tensor]] = {
        "count": lambda: torch.full((), rows * length, dtype=wide, device=x.device),
        "sum": lambda: total(values),
        "sum_squares": lambda: total(values * values),
        "sum_absolute": lambda: total(values.abs()),
        "absmax": lambda: largest(values.abs()),
        "minimum": lambda: least(values),
        "maximum": lambda: largest(values),
        "zeros": lambda: total(values == 0),
        "nans": lambda: total(values.isnan()),
        "infinities": lambda: total(values.isinf()),
    }
    moments: dict[str, torch.Tensor] = {}
    if "mean" in columns:
        moments = _central_moments(values, 4 if "moment4" in columns else 2)
    parts = [moments[name] if name in moments else reductions[name]() for name in columns]
    return torch.stack([part.to(wide) for part in parts])


def _central_moments(values: torch.Tensor, highest: int) -> dict[str, torch.Tensor]:
    """Mean and sums of powers of the deviation from it, up to ``highest``, of (rows, length).

    Power sums about the rounded mean of each row are moved to its mean, then rows are merged; both
    in float64, and both exact in arithmetic. Fourth powers leave the range of float32 soon: for
    them, deviations are taken in units of the row's largest.
    """
    wide = packed_dtype(values.device)
    length = values.shape[1]
    centre = values.mean(1)
    deviation = values - centre.unsqueeze(1)
    unit = torch.ones_like(centre)
    if highest == 4:
        unit = deviation.abs().amax(1)
        unit = torch.where(unit == 0, torch.ones_like(unit), unit)
        deviation = deviation / unit.unsqueeze(1)
    power, sums = deviation, []
    for _ in range(highest):
        sums.append(power.sum(1).to(wide) / length)
        power = power * deviation
    shift = sums[0]
    unit = unit.to(wide)
    row_mean = centre.to(wide) + shift * unit
    second = sums[1] - shift**2
    # A constant row: what is left is the rounding of its centre.
    constant = (second <= 1e-5 * sums[1]) & sums[1].isfinite()
    second = torch.where(constant, torch.zeros_like(second), second)
    mean = row_mean.mean()
    delta = row_mean - mean
    variance = second * unit**2
    moments = {"mean": mean, "moment2": length * (variance + delta**2).sum()}
    if highest == 4:
        third = sums[2] - 3 * shift * sums[1] + 2 * shift**3
        fourth = sums[3] - 4 * shift * sums[2] + 6 * shift**2 * sums[1] - 3 * shift**4
        third = torch.where(second == 0, torch.zeros_like(third), third * unit**3)
        fourth = torch.where(second == 0, torch.zeros_like(fourth), fourth * unit**4)
        moments["moment3"] = length * (third + 3 * delta * variance + delta**3).sum()
        moments["moment4"] = (
            length * (fourth + 4 * delta * third + 6 * delta**2 * variance + delta**4).sum()
        )
    return moments
