"""Rows of partial sums by torch operations: eagerly, or compiled for an accelerator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeAlias, cast

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tmm.core.inductor_private import compile_fx
from tmm.kernels.dense import accumulation_dtype, flatten, packed_dtype

Kernel: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

IDENTITIES = {"minimum": float("inf"), "maximum": float("-inf"), "absmax": 0.0}
"""Columns that do not add up, and what a tensor without elements has there."""

_ROW_LIMIT = 4096  # elements per row: keeps rounding small


def summarize_with_torch(x: torch.Tensor, columns: tuple[str, ...]) -> torch.Tensor:
    """The row of a real tensor of any shape by plain operations: what other kernels must equal."""
    if x.numel() == 0:
        values = [IDENTITIES.get(name, 0.0) for name in columns]
        return torch.tensor(values, dtype=packed_dtype(x.device), device=x.device)
    return _summarize_rows(columns, x.reshape(1, -1))


def summarize_with_inductor(x: torch.Tensor, columns: tuple[str, ...]) -> torch.Tensor | None:
    """The row of a real tensor on an accelerator, by a compiled kernel; None without elements."""
    if not x.numel():
        return None
    shape = _row_shape(x.numel())
    kernel = _compile(columns, x.dtype, x.device.type, shape[0] > 1)
    return kernel(flatten(x).view(shape))


@functools.lru_cache(maxsize=4096)
def _row_shape(elements: int) -> tuple[int, int]:
    """Equal rows of at most ``_ROW_LIMIT`` elements where a divisor allows, else one long row."""
    limit = min(elements, _ROW_LIMIT)
    for length in range(limit, limit // 16, -1):
        if elements % length == 0:
            return elements // length, length
    return 1, elements


@functools.cache
def _compile(
    columns: tuple[str, ...], dtype: torch.dtype, device_type: str, several_rows: bool
) -> Kernel:
    """The kernel for tensors of shape (rows, length) of one dtype; both are dynamic, 1 is not."""
    body = functools.partial(_summarize_rows, columns)
    with torch.no_grad():
        rows = 128 if several_rows else 1
        example = torch.empty(rows, _ROW_LIMIT, dtype=dtype, device=device_type)
        graph = make_fx(body, tracing_mode="symbolic")(example)
        (placeholder,) = graph.graph.find_nodes(op="placeholder")
        return cast("Kernel", compile_fx()(graph, [placeholder.meta["val"]]))


def _summarize_rows(columns: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """The row of ``x``, of shape (rows, length), by one reduction per row and column.

    Rows are reduced in the accumulation dtype, and merged in float64.
    """
    rows, length = x.shape
    wide = packed_dtype(x.device)
    values = x.to(accumulation_dtype(x.dtype))

    def total(per_element: torch.Tensor) -> torch.Tensor:
        return per_element.sum(1).to(wide).sum()

    reductions: dict[str, Callable[[], torch.Tensor]] = {
        "count": lambda: torch.full((), rows * length, dtype=wide, device=x.device),
        "sum": lambda: total(values),
        "sum_squares": lambda: total(values * values),
        "sum_absolute": lambda: total(values.abs()),
        "absmax": lambda: values.abs().amax(),
        "minimum": lambda: values.amin(),
        "maximum": lambda: values.amax(),
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
    deviation = values - centre[:, None]
    unit = torch.ones_like(centre)
    if highest == 4:
        unit = deviation.abs().amax(1)
        unit = torch.where(unit == 0, torch.ones_like(unit), unit)
        deviation = deviation / unit[:, None]
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
