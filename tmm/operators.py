"""The operators that rewritten graphs call: tensors in, rows of partial sums out.

``tmm::summarize`` and ``tmm::histogram`` reduce one tensor to a row, ``tmm::pack`` joins rows,
``tmm::copy`` keeps a whole tensor.
They are opaque to the compiler: one kernel per dtype and set of columns, compiled once with
dynamic shapes, serves every site of every graph, so that watching a module adds one node to a
graph and next to nothing to its compile time. ``tap`` marks a module's output while Dynamo traces.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TypeAlias, cast

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tmm.metrics import HISTOGRAM_EDGES

Kernel: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

COLUMN_SEPARATOR = ","
_UNROLL = 4  # independent partial sums per row: the latency of one addition chain would dominate
_ROW_LIMIT = 4096  # elements per row: fits the first-level cache for the second pass


def tap(tensor: torch.Tensor, path: str) -> torch.Tensor:
    """Mark ``tensor`` as a module's output; an identity.

    ``path`` locates the tensor inside the output, such as ``"[0]"``. Which module it is stands in
    the node's ``nn_module_stack``.
    """
    return tensor


def tap_value(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Mark ``tensor`` as a value that the model records under ``name``; an identity."""
    return tensor


for _mark in (tap, tap_value):
    torch._dynamo.allow_in_graph(_mark)
    torch.fx.node.has_side_effect(_mark)  # unused results: dead-code elimination must keep them

_library = torch.library.Library("tmm", "DEF")
# The reductions do not care in which order elements lie, so no layout is forced on producers.
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define("summarize(Tensor x, str columns, bool compiled) -> Tensor", tags=_tags)
_library.define("histogram(Tensor x) -> Tensor", tags=_tags)
_library.define("pack(Tensor[] rows) -> Tensor", tags=_tags)
_library.define("copy(Tensor x) -> Tensor", tags=_tags)


def why_unmeasurable(tensor: torch.Tensor) -> str | None:
    """Why an output has no rows, in a few words; None for one that has.

    Of a nested tensor with jagged layout the values are measured.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return f"{str(tensor.dtype).removeprefix('torch.')} output"
    return why_unreadable(tensor)


def why_unreadable(tensor: torch.Tensor) -> str | None:
    """Why the elements of a tensor of any dtype cannot be reduced; None if they can."""
    if torch._C._functorch.is_batchedtensor(tensor):
        return "inside torch.func.vmap"
    if tensor.layout not in (torch.strided, torch.jagged) or (
        tensor.is_nested and tensor.layout is torch.strided
    ):
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        return f"{kind} output"
    return None


def packed_dtype(device: torch.device) -> torch.dtype:
    """Float64, which keeps counts above 2**24 exact, or float32 on a device without it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _summarize(x: torch.Tensor, columns: str, compiled: bool) -> torch.Tensor:
    x = _real(x)
    names = tuple(columns.split(COLUMN_SEPARATOR))
    if compiled and (shape := _row_shape(x.numel())) is not None:
        return _compiled_kernel(names, x.dtype, x.device.type)(_flatten(x).view(shape))
    return _summarize_eagerly(x, names)


def _summarize_shape(x: torch.Tensor, columns: str, compiled: bool) -> torch.Tensor:
    return x.new_empty(columns.count(COLUMN_SEPARATOR) + 1, dtype=packed_dtype(x.device))


def _histogram(x: torch.Tensor) -> torch.Tensor:
    flat = _real(x).reshape(-1).to(packed_dtype(x.device))
    edges = torch.as_tensor(HISTOGRAM_EDGES.copy(), dtype=flat.dtype, device=flat.device)
    inner = edges[1:-1]
    # NaN is sorted behind every edge and dropped with the extra bin.
    bins = torch.where(flat.isnan(), len(inner) + 1, torch.bucketize(flat, inner, right=True))
    row = torch.zeros(len(inner) + 2, dtype=flat.dtype, device=flat.device)
    row.scatter_add_(0, bins, torch.ones_like(flat))
    return torch.cat([row.new_full((1,), flat.numel()), row[:-1]])


def _histogram_shape(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(HISTOGRAM_EDGES), dtype=packed_dtype(x.device))


def _pack(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows)


def _pack_shape(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0].new_empty(sum(row.numel() for row in rows))


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _copy_shape(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


for _name, _implementation, _shape in (
    ("summarize", _summarize, _summarize_shape),
    ("histogram", _histogram, _histogram_shape),
    ("pack", _pack, _pack_shape),
    ("copy", _copy, _copy_shape),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tmm::{_name}", _shape, lib=_library)

summarize: Callable[[torch.Tensor, str, bool], torch.Tensor] = torch.ops.tmm.summarize.default
histogram: Callable[[torch.Tensor], torch.Tensor] = torch.ops.tmm.histogram.default
pack: Callable[[list[torch.Tensor]], torch.Tensor] = torch.ops.tmm.pack.default
# Unlike a clone, which Inductor takes for an alias of a graph's input even where that is
# overwritten later in the graph.
copy: Callable[[torch.Tensor], torch.Tensor] = torch.ops.tmm.copy.default


def _real(x: torch.Tensor) -> torch.Tensor:
    """The real floating-point tensor that is measured: magnitudes of complex numbers."""
    if x.is_complex():
        return x.abs()
    return x if x.is_floating_point() else x.to(packed_dtype(x.device))


def _flatten(x: torch.Tensor) -> torch.Tensor:
    """All elements in one dimension, without a copy where they lie densely in any order."""
    if x.is_contiguous():
        return x.view(-1)
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return x.contiguous().view(-1)
            expected *= size
    return x.as_strided((x.numel(),), (1,))


@functools.lru_cache(maxsize=4096)
def _row_shape(elements: int) -> tuple[int, int] | None:
    """Equal rows for the compiled kernel: few enough elements each, a multiple of the unrolling.

    None where no such shape exists (an odd number of elements, a large prime factor).
    """
    if elements == 0 or elements % _UNROLL:
        return None
    limit = min(elements, _ROW_LIMIT)
    for length in range(limit - limit % _UNROLL, 0, -_UNROLL):
        if elements % length == 0:
            return (elements // length, length) if length * 16 >= limit else None
    return None


def _summarize_eagerly(x: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
    """The row of ``x`` by one torch reduction per column: plain, and what the kernel must equal."""
    flat = x.reshape(-1).to(_accumulation_dtype(x.dtype))
    if flat.numel() == 0:
        identity = {"absmax": 0.0, "minimum": math.inf, "maximum": -math.inf}
        values = [identity.get(name, 0.0) for name in names]
        return torch.tensor(values, dtype=packed_dtype(x.device), device=x.device)
    columns: dict[str, Callable[[], torch.Tensor]] = {
        "count": lambda: flat.new_full((), flat.numel(), dtype=packed_dtype(x.device)),
        "sum": flat.sum,
        "sum_squares": lambda: flat.square().sum(),
        "sum_absolute": lambda: flat.abs().sum(),
        "absmax": lambda: flat.abs().amax(),
        "minimum": flat.amin,
        "maximum": flat.amax,
        "zeros": lambda: (flat == 0).sum(),
        "nans": lambda: flat.isnan().sum(),
        "infinities": lambda: flat.isinf().sum(),
    }
    moments: dict[str, torch.Tensor] = {}
    if "mean" in names:
        highest = 4 if "moment4" in names else 2
        moments = _central_moments(flat.view(1, 1, -1), flat.mean().view(1), highest)
    parts = [moments[n] if n in moments else columns[n]() for n in names]
    return torch.stack([part.to(packed_dtype(x.device)) for part in parts])


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _compiled_kernel(names: tuple[str, ...], dtype: torch.dtype, device_type: str) -> Kernel:
    """The kernel for tensors of shape (rows, length) of one dtype, both dimensions dynamic."""
    from torch._inductor.compile_fx import compile_fx  # slow to import, and not always needed

    body = functools.partial(_summarize_rows, names)
    with torch.no_grad():
        example = torch.empty(128, _ROW_LIMIT, dtype=dtype, device=device_type)
        graph = make_fx(body, tracing_mode="symbolic")(example)
        (placeholder,) = graph.graph.find_nodes(op="placeholder")
        return cast("Kernel", compile_fx(graph, [placeholder.meta["val"]]))


def _summarize_rows(names: tuple[str, ...], x: torch.Tensor) -> torch.Tensor:
    """One pass over short rows in the accumulation dtype, then float64 over the rows.

    Short rows keep rounding small and let the second pass, for the moments, read from cache.
    """
    rows, length = x.shape
    wide = packed_dtype(x.device)
    values = x.view(rows, _UNROLL, length // _UNROLL).to(_accumulation_dtype(x.dtype))

    def total(per_element: torch.Tensor) -> torch.Tensor:
        return _pairwise(per_element, torch.add).sum(1)

    columns: dict[str, Callable[[], torch.Tensor]] = {
        "sum": lambda: total(values).to(wide).sum(),
        "sum_squares": lambda: total(values * values).to(wide).sum(),
        "sum_absolute": lambda: total(values.abs()).to(wide).sum(),
        "absmax": lambda: _pairwise(values.abs(), torch.maximum).amax(1).amax(),
        "minimum": lambda: _pairwise(values, torch.minimum).amin(1).amin(),
        "maximum": lambda: _pairwise(values, torch.maximum).amax(1).amax(),
        "zeros": lambda: total((values == 0).to(values.dtype)).to(wide).sum(),
        "nans": lambda: total(values.isnan().to(values.dtype)).to(wide).sum(),
        "infinities": lambda: total(values.isinf().to(values.dtype)).to(wide).sum(),
        "count": lambda: torch.full((), rows * length, dtype=wide, device=x.device),
    }
    moments: dict[str, torch.Tensor] = {}
    if "mean" in names:
        highest = 4 if "moment4" in names else 2
        moments = _central_moments(values, total(values) / length, highest)
    parts = [moments[n] if n in moments else columns[n]() for n in names]
    return torch.stack([part.to(wide) for part in parts])


def _pairwise(
    values: torch.Tensor, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    a, b, c, d = values.unbind(1)
    return combine(combine(a, b), combine(c, d))


def _central_moments(
    values: torch.Tensor, centre: torch.Tensor, highest: int
) -> dict[str, torch.Tensor]:
    """Mean and sums of powers of the deviation from it, up to ``highest``.

    ``values`` is (rows, parts, n) and ``centre`` (rows,) is near the mean of each row. Power sums
    about the centre are moved to the row's mean, then rows are merged; both in float64, and both
    exact in arithmetic, so that a rounded centre does no harm. Fourth powers leave the range of
    float32 soon: for them, deviations are taken in units of the row's largest.
    """
    wide = packed_dtype(values.device)
    length = values.shape[1] * values.shape[2]
    deviation = values - centre[:, None, None]
    unit = torch.ones_like(centre)
    if highest == 4:
        unit = deviation.abs().amax((1, 2))
        unit = torch.where(unit == 0, torch.ones_like(unit), unit)
        deviation = deviation / unit[:, None, None]
    power, sums = deviation, []
    for _ in range(highest):
        partial = _pairwise(power, torch.add) if power.shape[1] == _UNROLL else power[:, 0]
        sums.append(partial.sum(1).to(wide) / length)
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
