"""Statistics of many tensors at once, such as all parameters and gradients of a model.

One row of partial sums per tensor, the same as ``tmm::summarize`` gives, without waiting for the
device and without large temporaries. On a CPU one call reads all tensors of a dtype, on a GPU one
launch (``tmm.kernels.summarize.group_triton``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tmm.kernels import kernel_registry
from tmm.kernels.dense import on_device
from tmm.kernels.summarize.differences import (
    Pairs,
    columns_of_difference,
    difference,
    further_terms,
    pieces_of_pairs,
)
from tmm.kernels.summarize.group_host import summarize_pairs_on_host
from tmm.kernels.summarize.torch_rows import IDENTITIES


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
        return kernel_registry.run("summarize_group", device, tensors, columns)


def _summarize_pairs(
    own: Sequence[torch.Tensor], others: Sequence[torch.Tensor], columns: tuple[str, ...]
) -> torch.Tensor:
    pairs = list(zip(own, others, strict=True))
    rows = summarize_pairs_on_host(pairs, columns)
    if rows is not None:
        return rows
    needed = columns if "count" in columns else ("count", *columns)  # merging weighs by it
    owners: list[int] = []
    parts: list[torch.Tensor] = []
    for part in pieces_of_pairs(pairs):
        owners += [owner for owner, _, _ in part]
        parts.append(_rows_of_part([(a, b) for _, a, b in part], needed))
    joined = torch.cat(parts)
    if len(owners) > len(pairs):
        owner = on_device(torch.tensor(owners, device="cpu"), joined.device)
        joined = merge_rows(joined, owner, len(pairs), needed)
    return joined[:, len(needed) - len(columns) :]


def _rows_of_part(pairs: Pairs, columns: tuple[str, ...]) -> torch.Tensor:
    """The rows of pairs whose differences may be written down together."""
    differences = [difference(a, b) for a, b in pairs]
    rows = [summarize_group(differences, columns_of_difference(columns))]
    del differences
    for term in zip(*(further_terms(a, b, columns) for a, b in pairs), strict=True):
        tensors, needed = zip(*term, strict=True)
        rows.append(summarize_group(tensors, needed[0]))
    return torch.cat(rows, 1)


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
