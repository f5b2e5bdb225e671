"""Statistics of many tensors at once, such as all parameters and gradients of a model.

One row of partial sums per tensor, the same as ``tmm::summarize`` gives, without waiting for the
device and without large temporaries. On a CPU one call reads all tensors of a dtype, on a GPU one
launch (``tmm.kernels.summarize.group_triton``).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from tmm.kernels.build import DTYPES
from tmm.kernels.dense import flatten, real
from tmm.kernels.summarize.differences import (
    can_be_read_together,
    columns_of_difference,
    difference,
    flatten_pair,
    further_terms,
)
from tmm.kernels.summarize.host import summarize_on_host
from tmm.kernels.summarize.torch_rows import IDENTITIES, summarize_with_torch


def summarize_group(
    tensors: Sequence[torch.Tensor],
    columns: tuple[str, ...],
    subtracted: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """One row of partial sums per tensor.

    Args:
        tensors: Tensors of any dtypes, shapes and strides on one device, empty ones included.
            Those that lie densely in memory are not copied; of complex ones the magnitudes are
            taken first.
        columns: Names from ``tmm.core.metrics.COLUMN_ORDER``, those of pairs last; ``mean`` and
            ``moment2``, and then ``moment3`` and ``moment4``, only together.
        subtracted: As many tensors of the same shapes; rows are then of the differences, which a
            CPU does not write down, and of the pairs.

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
        return torch.empty(0, len(columns), dtype=torch.float64, device="cpu")
    (device,) = devices
    with torch.no_grad():
        if subtracted is not None:
            return _summarize_pairs(tensors, subtracted, columns)
        if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
            from tmm.kernels.summarize.group_triton import summarize_chunks

            needed = columns if "count" in columns else ("count", *columns)  # merging weighs by it
            return summarize_chunks(tensors, needed)[:, len(needed) - len(columns) :]
        flat = [_readable(tensor) for tensor in tensors]
        rows = _summarize_on_host(flat, columns) if device.type == "cpu" else None
        if rows is not None:
            return rows
        return torch.stack([summarize_with_torch(tensor, columns) for tensor in flat])


def _summarize_pairs(
    own: Sequence[torch.Tensor], others: Sequence[torch.Tensor], columns: tuple[str, ...]
) -> torch.Tensor:
    pairs = list(zip(own, others, strict=True))
    if all(can_be_read_together(a, b) for a, b in pairs):
        flat = [flatten_pair(a, b) for a, b in pairs]
        rows = _summarize_on_host([a for a, _ in flat], columns, [b for _, b in flat])
        if rows is not None:
            return rows
    differences = [difference(a, b) for a, b in pairs]
    parts = [summarize_group(differences, columns_of_difference(columns))]
    for term in zip(*(further_terms(a, b, columns) for a, b in pairs), strict=True):
        tensors, needed = zip(*term, strict=True)
        parts.append(summarize_group(tensors, needed[0]))
    return torch.cat(parts, 1)


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """One that lies densely, is real and of a dtype that kernels know, in any shape."""
    if tensor.is_contiguous() and tensor.dtype in DTYPES:
        return tensor  # as most are
    tensor = real(tensor.detach())
    return flatten(tensor if tensor.dtype in DTYPES else tensor.float())


def _summarize_on_host(
    tensors: list[torch.Tensor],
    columns: tuple[str, ...],
    subtracted: list[torch.Tensor] | None = None,
) -> torch.Tensor | None:
    """The rows of tensors of any of the kernels' dtypes; None where there is no kernel."""
    members: dict[torch.dtype, list[int]] = {}
    for index, tensor in enumerate(tensors):
        members.setdefault(tensor.dtype, []).append(index)
    if len(members) == 1:
        return summarize_on_host(tensors, columns, subtracted)
    rows = torch.empty(len(tensors), len(columns), dtype=torch.float64, device="cpu")
    for indices in members.values():
        others = None if subtracted is None else [subtracted[index] for index in indices]
        of_dtype = summarize_on_host([tensors[index] for index in indices], columns, others)
        if of_dtype is None:
            return None
        rows[indices] = of_dtype
    return rows


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
