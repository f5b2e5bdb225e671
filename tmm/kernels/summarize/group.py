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
from tmm.kernels.summarize.differences import Pairs, is_read_as_it_lies
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
        subtracted: As many tensors of the same shapes; rows are then of the differences, which
            kernels do not write down, and of the pairs.

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
            return summarize_pairs(list(zip(tensors, subtracted, strict=True)), columns)
        return kernel_registry.run("summarize_group", device, tensors, columns)


def summarize_pairs(pairs: Pairs, columns: tuple[str, ...]) -> torch.Tensor:
    """One row per pair of tensors of one shape, all of them on one device.

    Pairs that a kernel can read as they lie are reduced together, without their differences being
    written down; a part of the others at a time. That of a CPU reads all of them or none.

    Returns:
        Float64 (``packed_dtype``), shape ``(len(pairs), len(columns))``, on their device; columns
        of one tensor are those of the differences.
    """
    device = pairs[0][0].device
    with torch.no_grad():
        if device.type == "cpu":
            return kernel_registry.run("summarize_pairs", device, pairs, columns)
        as_they_lie = [is_read_as_it_lies(*pair) for pair in pairs]
        order = sorted(range(len(pairs)), key=as_they_lie.__getitem__)
        others = as_they_lie.count(False)
        if others in (0, len(pairs)):
            return kernel_registry.run("summarize_pairs", device, pairs, columns)
        halves = ([pairs[place] for place in half] for half in (order[:others], order[others:]))
        rows = [kernel_registry.run("summarize_pairs", device, half, columns) for half in halves]
        back = torch.tensor(order, device="cpu").argsort()
        return torch.cat(rows).index_select(0, on_device(back, device))


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
