"""Statistics of many tensors at once, such as all parameters and gradients of a model.

One row of partial sums per tensor, the same as ``tmm::summarize`` gives, without waiting for the
device and without large temporaries. On a CPU every tensor is cut into rows of ``_LENGTH``
elements, which a kernel compiled once per dtype and set of columns reads once; what is left over,
and small tensors, are stacked by size so that a model costs few calls. On a GPU see
``tmm.runtime.grouped_triton``.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tmm.operators import (
    COLUMN_SEPARATOR,
    Kernel,
    _accumulation_dtype,
    _flatten,
    _real,
    packed_dtype,
    summarize,
)

_LENGTH = 4096  # elements per row: keeps rounding small and fits the first-level cache
_PARTS = 8  # independent partial sums: the latency of one chain of additions would dominate
_SAMPLE = _LENGTH // 16  # elements whose mean is the centre of a row's deviations
_BATCH = 1 << 18  # elements that are copied together at most: a call costs as much as 100 000

IDENTITIES = {"minimum": math.inf, "maximum": -math.inf, "absmax": 0.0}
"""Columns that do not add up, and what a tensor without elements has there."""


def summarize_group(tensors: Sequence[torch.Tensor], columns: tuple[str, ...]) -> torch.Tensor:
    """One row of partial sums per tensor.

    Args:
        tensors: Tensors of any dtypes, shapes and strides on one device, empty ones included.
            Those that lie densely in memory are not copied; of complex ones the magnitudes are
            taken first.
        columns: Names from ``tmm.metrics.COLUMN_ORDER``; ``mean`` and ``moment2``, and then
            ``moment3`` and ``moment4``, only together.

    Returns:
        Float64 (``packed_dtype``) of shape ``(len(tensors), len(columns))`` on their device. On a
        GPU it is not ready yet when this returns.

    Raises:
        ValueError: The tensors lie on several devices.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"tensors: all must be on one device, not on {names}; group them first")
    if not tensors:
        return torch.empty(0, len(columns), dtype=torch.float64)
    (device,) = devices
    needed = columns if "count" in columns else ("count", *columns)  # merging weighs by it
    with torch.no_grad():
        if device.type == "cpu":
            rows = _summarize_on_host(tensors, needed)
        elif device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            from tmm.runtime.grouped_triton import summarize_chunks

            rows = summarize_chunks(tensors, needed)
        else:
            joined = COLUMN_SEPARATOR.join(needed)
            rows = torch.stack([summarize(tensor, joined, False) for tensor in tensors])
    return rows[:, len(needed) - len(columns) :]


def merge_rows(
    rows: torch.Tensor, owner: torch.Tensor, tensors: int, columns: tuple[str, ...]
) -> torch.Tensor:
    """Join the rows of pieces of tensors, in a number of operations that does not grow.

    Args:
        rows: Float64, shape ``(pieces, len(columns))``; no piece is empty.
        owner: Int64, shape ``(pieces,)``: the index of the tensor that a piece is from.
        tensors: Number of tensors; one without pieces gets the row of an empty tensor.
        columns: Names; ``count`` is among them.

    Returns:
        Float64, shape ``(tensors, len(columns))``. Moments follow Pébay 2008, eq. 2.1, for many
        parts at once.
    """
    joined = rows.new_zeros(tensors, len(columns)).index_add_(0, owner, rows)
    for name, identity in IDENTITIES.items():
        if name in columns:
            index = columns.index(name)
            lowest = name == "minimum"
            joined[:, index] = rows.new_full((tensors,), identity).scatter_reduce_(
                0, owner, rows[:, index], "amin" if lowest else "amax"
            )
    if "mean" not in columns:
        return joined

    def add(values: torch.Tensor) -> torch.Tensor:
        return rows.new_zeros(tensors).index_add_(0, owner, values)

    own = {name: rows[:, index] for index, name in enumerate(columns)}
    count, second = own["count"], own["moment2"]
    mean = add(count * own["mean"]) / joined[:, columns.index("count")].clamp(min=1)
    delta = own["mean"] - mean[owner]
    moments = {"mean": mean, "moment2": add(second + count * delta**2)}
    if "moment4" in columns:
        third = own["moment3"]
        moments["moment3"] = add(third + 3 * delta * second + count * delta**3)
        moments["moment4"] = add(
            own["moment4"] + 4 * delta * third + 6 * delta**2 * second + count * delta**4
        )
    for name, values in moments.items():
        joined[:, columns.index(name)] = values
    return joined


@dataclass(frozen=True)
class _Batch:
    """Pieces of equal size and dtype that are reduced together: ``(tensor, start)`` of each."""

    pieces: tuple[tuple[int, int], ...]
    dtype: torch.dtype
    rows: int
    length: int

    @property
    def elements(self) -> int:
        """Elements of one piece."""
        return self.rows * self.length


@functools.lru_cache(maxsize=64)
def _plan(sizes: tuple[tuple[torch.dtype, int], ...]) -> tuple[tuple[_Batch, ...], torch.Tensor]:
    """How tensors of these dtypes and numbers of elements are cut, and whose each piece is."""
    pieces: dict[tuple[torch.dtype, int, int], list[tuple[int, int]]] = {}
    for index, (dtype, elements) in enumerate(sizes):
        rows, rest = divmod(elements, _LENGTH)
        if rows:
            pieces.setdefault((dtype, rows, _LENGTH), []).append((index, 0))
        if rest:
            pieces.setdefault((dtype, 1, rest), []).append((index, rows * _LENGTH))
    batches = []
    for (dtype, rows, length), equal in pieces.items():
        together = max(1, _BATCH // (rows * length))
        for start in range(0, len(equal), together):
            some = tuple(equal[start : start + together])
            batches.append(_Batch(some, dtype, rows, length))
    owners = [index for batch in batches for index, _ in batch.pieces]
    return tuple(batches), torch.tensor(owners, dtype=torch.int64)


def _summarize_on_host(tensors: Sequence[torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
    # Magnitudes and copies of sparse strides live as long as the batch that needs them.
    batches, owner = _plan(tuple((_real_dtype(t), t.numel()) for t in tensors))
    rows = [torch.empty(0, len(names), dtype=torch.float64)]
    for batch in batches:
        parts = []
        for index, start in batch.pieces:
            flat = _flatten(_real(tensors[index].detach()))
            parts.append(flat[start : start + batch.elements])
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        blocks = joined.view(len(parts), batch.rows, batch.length)
        if batch.length == _LENGTH:
            rows.append(_compiled_kernel(names, batch.dtype)(blocks))
        else:
            rows.append(_summarize_blocks(names, blocks))
    return merge_rows(torch.cat(rows), owner, len(tensors), names)


def _real_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that ``_real`` gives."""
    if tensor.is_floating_point():
        return tensor.dtype
    return tensor.dtype.to_real() if tensor.is_complex() else packed_dtype(tensor.device)


@functools.cache
def _compiled_kernel(names: tuple[str, ...], dtype: torch.dtype) -> Kernel:
    """The kernel for blocks of shape (pieces, rows, ``_LENGTH``); pieces and rows are dynamic."""
    from torch._inductor.compile_fx import compile_fx  # slow to import, and not always needed

    with torch.no_grad():
        example = torch.empty(2, 64, _LENGTH, dtype=dtype)
        body = functools.partial(_summarize_blocks, names)
        graph = make_fx(body, tracing_mode="symbolic")(example)
        (placeholder,) = graph.graph.find_nodes(op="placeholder")
        return cast("Kernel", compile_fx(graph, [placeholder.meta["val"]]))


def _summarize_blocks(names: tuple[str, ...], blocks: torch.Tensor) -> torch.Tensor:
    """Rows of partial sums, (pieces, columns), of blocks of shape (pieces, rows, length).

    The elements are read once: deviations are taken from the mean of a sample of their row, which
    is within ``sqrt(length / sample - 1)`` standard deviations of the row's own mean, so that
    moving the power sums there costs little precision. It also gives the sum and the sum of
    squares, and the absolute maximum is that of the extremes.
    """
    pieces, rows = blocks.shape[:2]
    length = int(blocks.shape[2])  # a constant of the compiled kernel
    parts = _PARTS if length == _LENGTH else 1
    values = blocks.reshape(pieces * rows, parts, length // parts)
    values = values.to(_accumulation_dtype(blocks.dtype))
    wide = packed_dtype(blocks.device)

    def over_rows(per_row: torch.Tensor) -> torch.Tensor:
        return per_row.to(wide).view(pieces, rows)

    def total(per_element: torch.Tensor) -> torch.Tensor:
        return over_rows(_tree(per_element, torch.add).sum(1)).sum(1)

    def lowest(per_element: torch.Tensor) -> torch.Tensor:
        return over_rows(_tree(per_element, torch.minimum).amin(1)).amin(1)

    def highest(per_element: torch.Tensor) -> torch.Tensor:
        return over_rows(_tree(per_element, torch.maximum).amax(1)).amax(1)

    columns: dict[str, Callable[[], torch.Tensor]] = {
        "count": lambda: torch.full((pieces,), rows * length, dtype=wide, device=blocks.device),
        "sum": lambda: total(values),
        "sum_squares": lambda: total(values * values),
        "sum_absolute": lambda: total(values.abs()),
        "absmax": lambda: highest(values.abs()),
        "minimum": lambda: lowest(values),
        "maximum": lambda: highest(values),
        "zeros": lambda: total((values == 0).to(values.dtype)),
        "nans": lambda: total(values.isnan().to(values.dtype)),
        "infinities": lambda: total(values.isinf().to(values.dtype)),
    }
    done: dict[str, torch.Tensor] = {}
    if "mean" in names:
        done |= _moments(values, over_rows, 4 if "moment4" in names else 2)
    for name in names:
        if name == "absmax" and {"minimum", "maximum"} <= set(names):
            continue
        if name not in done:
            done[name] = columns[name]()
    if "absmax" in names and "absmax" not in done:
        done["absmax"] = torch.maximum(done["maximum"], -done["minimum"])
    return torch.stack([done[name] for name in names], dim=1)


def _tree(
    values: torch.Tensor, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Combine the parts of each row, (rows, parts, n) to (rows, n), pair by pair."""
    parts = list(values.unbind(1))
    while len(parts) > 1:
        parts = [combine(*pair) for pair in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _moments(
    values: torch.Tensor, over_rows: Callable[[torch.Tensor], torch.Tensor], highest: int
) -> dict[str, torch.Tensor]:
    """Mean and central moments of each piece; with ``highest`` 2 the plain sums follow as well.

    See ``tmm.operators._central_moments`` for the arithmetic. Fourth powers need a nearer centre,
    which costs a second pass, and units of the row's largest deviation; these are lost where a
    value is infinite, so that the plain sums are then not derived.
    """
    length = values.shape[1] * values.shape[2]
    if highest == 4:
        centre = _tree(values, torch.add).sum(1) / length
    else:
        sample = values[:, 0, :_SAMPLE]
        centre = sample.sum(1) / sample.shape[1]
    # Deviations from a centre that is not finite would lose the sign of an infinite sum.
    centre = torch.where(centre.isfinite(), centre, torch.zeros_like(centre))
    deviation = values - centre[:, None, None]
    unit = torch.ones_like(centre)
    if highest == 4:
        unit = deviation.abs().amax((1, 2))
        unit = torch.where(unit == 0, torch.ones_like(unit), unit)
        deviation = deviation / unit[:, None, None]
    power, sums = deviation, []
    for _ in range(highest):
        sums.append(over_rows(_tree(power, torch.add).sum(1)) / length)
        power = power * deviation
    wide_centre, wide_unit, shift = over_rows(centre), over_rows(unit), sums[0]
    second = sums[1] - shift**2
    # A constant row: what is left is the rounding of its centre.
    constant = (second <= 1e-5 * sums[1]) & sums[1].isfinite()
    second = torch.where(constant, torch.zeros_like(second), second)
    variance = second * wide_unit**2
    finite_shift = torch.where(shift.isfinite(), shift, torch.full_like(shift, math.nan))
    row_mean = wide_centre + finite_shift * wide_unit
    mean = row_mean.mean(1)
    delta = row_mean - mean[:, None]
    moments = {"mean": mean, "moment2": length * (variance + delta**2).sum(1)}
    if highest == 2:
        moments["sum"] = length * (wide_centre + shift).sum(1)
        squares = sums[1] + 2 * wide_centre * shift + wide_centre**2
        squares = torch.where(sums[1].isfinite(), squares.clamp(min=0), sums[1])
        moments["sum_squares"] = length * squares.sum(1)
        return moments
    third = sums[2] - 3 * shift * sums[1] + 2 * shift**3
    fourth = sums[3] - 4 * shift * sums[2] + 6 * shift**2 * sums[1] - 3 * shift**4
    third = torch.where(second == 0, torch.zeros_like(third), third * wide_unit**3)
    fourth = torch.where(second == 0, torch.zeros_like(fourth), fourth * wide_unit**4)
    moments["moment3"] = length * (third + 3 * delta * variance + delta**3).sum(1)
    moments["moment4"] = length * (
        fourth + 4 * delta * third + 6 * delta**2 * variance + delta**4
    ).sum(1)
    return moments
