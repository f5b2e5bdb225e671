"""The operators that rewritten graphs call: tensors in, rows of partial sums out.

``tmm::summarize`` and ``tmm::histogram`` reduce one tensor to a row, ``tmm::summarize_difference``
a pair and its difference without writing that down, ``tmm::summarize_heads`` each head of one,
``tmm::summarize_attention`` the distributions of an attention; ``tmm::pack`` joins rows,
``tmm::copy`` keeps a whole tensor. ``tmm::summarize_into`` and ``tmm::put`` write rows into a
tensor that a graph hands on from one to the next, so that nobody joins them.
``tmm::drop_rows`` tells those in C++ whether anybody wants their rows.
They are opaque to the compiler: kernels that are compiled once, for all shapes, serve every site of
every graph (``tmm.kernels``), so that watching a module adds one node to a graph and next to
nothing to its compile time. ``tap`` marks a module's output while Dynamo traces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tmm.core.metrics import COLUMN_SEPARATOR, HISTOGRAM_EDGES
from tmm.kernels import kernel_registry
from tmm.kernels.attention.attention_call import ATTENTION_COLUMNS, chosen_columns, chosen_elements
from tmm.kernels.attention.choose import summarize_attention as summarize_attention_of
from tmm.kernels.dense import packed_dtype, real
from tmm.kernels.summarize.differences import (
    can_be_read_together,
    columns_of_difference,
    difference,
    further_terms,
)
from tmm.kernels.summarize.group import summarize_group


def tap(
    tensor: torch.Tensor, path: str, requires_grad: bool = True, is_grad_enabled: bool = True
) -> torch.Tensor:
    """Mark ``tensor`` as a module's output; an identity.

    ``path`` locates the tensor inside the output, such as ``"[0]"``. Which module it is stands in
    the node's ``nn_module_stack``. The flags tell how things are there: the tensor may come to
    require a gradient later, and an operation inside of ``no_grad`` hands on none.
    """
    return tensor


def tap_value(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Mark ``tensor`` as a value that the model records under ``name``; an identity."""
    return tensor


def tap_input(tensor: torch.Tensor, path: str) -> torch.Tensor:
    """Mark ``tensor`` as what a module is called with; an identity."""
    return tensor


def tap_shown(tensor: torch.Tensor, module: int, path: str) -> torch.Tensor:
    """Mark ``tensor`` as one that the program shows under a name; an identity.

    The name is that of the module whose ``id`` is ``module``, and ``path``; ``path`` alone for 0.
    """
    return tensor


def tap_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    module: int,
    path: str,
) -> torch.Tensor:
    """Mark an attention that the program shows, named as in ``tap_shown``; gives ``query``."""
    return query


MARKS = (tap, tap_value, tap_input, tap_shown, tap_attention)

for _mark in MARKS:
    torch.compiler.allow_in_graph(_mark)
    torch.fx.node.has_side_effect(_mark)  # unused results: dead-code elimination must keep them

_library = torch.library.Library("tmm", "DEF")
# The reductions do not care in which order elements lie, so no layout is forced on producers.
_tags = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
_library.define("summarize(Tensor x, str columns) -> Tensor", tags=_tags)
_library.define("summarize_any(Tensor x, str columns) -> Tensor", tags=_tags)
_library.define("summarize_difference(Tensor own, Tensor other, str columns) -> Tensor", tags=_tags)
_library.define("histogram(Tensor x) -> Tensor", tags=_tags)
_library.define("summarize_heads(Tensor x, str columns) -> Tensor", tags=_tags)
_library.define(
    "summarize_attention(Tensor query, Tensor key, Tensor? mask, bool is_causal, float? scale,"
    " int? queries, bool pooled, str statistics) -> Tensor",
    tags=_tags,
)
_library.define(
    "summarize_into(Tensor(a!) rows, int start, Tensor x, str columns) -> ()", tags=_tags
)
_library.define("put(Tensor(a!) rows, int start, Tensor[] given) -> ()", tags=_tags)
_library.define("drop_rows(bool drops) -> bool")
_library.define("pack(Tensor[] rows) -> Tensor", tags=_tags)
_library.define("copy(Tensor x) -> Tensor", tags=_tags)


def _summarize(x: torch.Tensor, columns: str) -> torch.Tensor:
    x = real(x)
    names = tuple(columns.split(COLUMN_SEPARATOR))
    return kernel_registry.run("summarize", x.device, x, names)


def _summarize_shape(x: torch.Tensor, columns: str) -> torch.Tensor:
    return x.new_empty(columns.count(COLUMN_SEPARATOR) + 1, dtype=packed_dtype(x.device))


def _summarize_difference(own: torch.Tensor, other: torch.Tensor, columns: str) -> torch.Tensor:
    names = tuple(columns.split(COLUMN_SEPARATOR))
    if can_be_read_together(own, other):
        return kernel_registry.run("summarize_pairs", own.device, [(own, other)], names)[0]
    terms = [(difference(own, other), columns_of_difference(names))]
    terms += further_terms(own, other, names)
    return torch.cat([summarize(term, COLUMN_SEPARATOR.join(needed)) for term, needed in terms])


def _difference_shape(own: torch.Tensor, other: torch.Tensor, columns: str) -> torch.Tensor:
    return _summarize_shape(own, columns)


def inner_edges(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The finite edges of the bins of a histogram."""
    if device.type == "cpu":
        return torch.as_tensor(HISTOGRAM_EDGES[1:-1].copy(), dtype=dtype, device=device)
    # A copy from the CPU would wait for the device, and cannot be recorded in a CUDA graph: powers
    # of two are made of the bits of their exponents.
    bits, digits, bias = _BITS[dtype]
    lowest, highest = (round(math.log2(edge)) for edge in (_POSITIVE[0], _POSITIVE[-1]))
    exponents = torch.arange(lowest + bias, highest + bias + 1, dtype=bits, device=device)
    powers = (exponents << digits).view(dtype)
    return torch.cat([-powers.flip(0), powers])


_POSITIVE = HISTOGRAM_EDGES[len(HISTOGRAM_EDGES) // 2 : -1].tolist()
_BITS = {torch.float64: (torch.int64, 52, 1023), torch.float32: (torch.int32, 23, 127)}
"""The integer of as many bits, the digits behind the exponent, and what the exponent 0 is there."""


def _histogram(x: torch.Tensor) -> torch.Tensor:
    flat = real(x).reshape(-1).to(packed_dtype(x.device))
    inner = inner_edges(flat.dtype, flat.device)
    # NaN is sorted behind every edge and dropped with the extra bin.
    bins = torch.where(flat.isnan(), len(inner) + 1, torch.bucketize(flat, inner, right=True))
    row = torch.zeros(len(inner) + 2, dtype=flat.dtype, device=flat.device)
    row.scatter_add_(0, bins, torch.ones_like(flat))
    return torch.cat([row.new_full((1,), flat.numel()), row.narrow(0, 0, len(inner) + 1)])


def _histogram_shape(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(len(HISTOGRAM_EDGES), dtype=packed_dtype(x.device))


def _summarize_heads(x: torch.Tensor, columns: str) -> torch.Tensor:
    heads = real(x).movedim(-3, 0).contiguous()
    return summarize_group(list(heads), tuple(columns.split(COLUMN_SEPARATOR))).reshape(-1)


def _summarize_heads_shape(x: torch.Tensor, columns: str) -> torch.Tensor:
    width = columns.count(COLUMN_SEPARATOR) + 1
    return x.new_empty(x.shape[-3] * width, dtype=packed_dtype(x.device))


def _summarize_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    queries: int | None,
    pooled: bool,
    statistics: str,
) -> torch.Tensor:
    stride = stride_of(query, queries)
    rows = summarize_attention_of(
        *(query, key, mask), is_causal=is_causal, scale=scale, query_stride=stride
    )
    if pooled or rows.device.type != "cpu":
        return select_statistics(rows, statistics, pooled=pooled)
    return rows.take(chosen_elements(len(rows), tuple(statistics.split(COLUMN_SEPARATOR))))


def select_statistics(rows: torch.Tensor, statistics: str, *, pooled: bool) -> torch.Tensor:
    """Count and value of each of the ``statistics`` of each head, one after the other.

    ``rows`` are those of ``tmm.kernels.attention.choose``; ``pooled`` joins them.
    """
    last = ATTENTION_COLUMNS.index("max_logit")
    if pooled:
        rows = torch.cat([rows[:, :last].sum(0), rows[:, last:].amax(0)])[None]
    columns = chosen_columns(statistics.split(COLUMN_SEPARATOR))
    return torch.stack([rows[:, column] for column in columns], 1).reshape(-1)


def _summarize_attention_shape(query: torch.Tensor, key: torch.Tensor, *rest: Any) -> torch.Tensor:
    *_, pooled, statistics = rest
    heads = 1 if pooled else attention_heads(query, key)
    length = 2 * heads * (statistics.count(COLUMN_SEPARATOR) + 1)
    return query.new_empty(length, dtype=packed_dtype(query.device))


def stride_of(query: torch.Tensor, queries: int | None) -> int:
    """The distance of ``queries`` queries, at most, that are evenly spaced."""
    return 1 if queries is None else max(1, -(-int(query.shape[-2]) // queries))


def attention_heads(query: torch.Tensor, key: torch.Tensor) -> int:
    """The number of heads of an attention; a single one without a dimension for them."""
    return max(int(x.shape[-3]) if x.dim() > 2 else 1 for x in (query, key))


def _pack(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows)


def _pack_shape(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0].new_empty(sum(row.numel() for row in rows))


def _put(rows: torch.Tensor, start: int, given: list[torch.Tensor]) -> None:
    together = torch.cat(given)
    rows[start : start + len(together)] = together


def _summarize_into(rows: torch.Tensor, start: int, x: torch.Tensor, columns: str) -> None:
    _put(rows, start, [_summarize(x, columns)])


def _writes(rows: torch.Tensor, *rest: Any) -> None:
    return None


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _copy_shape(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _drop_rows(drops: bool) -> bool:
    return False


_library.impl("drop_rows", _drop_rows, "CompositeImplicitAutograd")  # in C++, once that is loaded

for _name, _implementation, _shape in (
    ("summarize", _summarize, _summarize_shape),  # of a CPU in C++, once that is loaded
    ("summarize_any", _summarize, _summarize_shape),  # what that leaves to Python
    ("summarize_difference", _summarize_difference, _difference_shape),
    ("histogram", _histogram, _histogram_shape),
    ("summarize_heads", _summarize_heads, _summarize_heads_shape),
    ("summarize_attention", _summarize_attention, _summarize_attention_shape),
    ("summarize_into", _summarize_into, _writes),  # of a CPU in C++, likewise
    ("put", _put, _writes),
    ("pack", _pack, _pack_shape),
    ("copy", _copy, _copy_shape),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tmm::{_name}", _shape, lib=_library)

summarize: Callable[[torch.Tensor, str], torch.Tensor] = torch.ops.tmm.summarize.default
summarize_difference: Callable[[torch.Tensor, torch.Tensor, str], torch.Tensor] = (
    torch.ops.tmm.summarize_difference.default
)
histogram: Callable[[torch.Tensor], torch.Tensor] = torch.ops.tmm.histogram.default
summarize_heads: Callable[[torch.Tensor, str], torch.Tensor] = torch.ops.tmm.summarize_heads.default
summarize_attention: Callable[..., torch.Tensor] = torch.ops.tmm.summarize_attention.default
REDUCTIONS = (summarize, summarize_difference, summarize_heads, summarize_attention)
"""Those that read their first argument, and give a row of it."""
summarize_into: Callable[[torch.Tensor, int, torch.Tensor, str], None] = (
    torch.ops.tmm.summarize_into.default
)
drop_rows: Callable[[bool], bool] = torch.ops.tmm.drop_rows.default
"""Gives what it was before; see ``tmm.kernels.dropped_rows``."""
put: Callable[[torch.Tensor, int, list[torch.Tensor]], None] = torch.ops.tmm.put.default
pack: Callable[[list[torch.Tensor]], torch.Tensor] = torch.ops.tmm.pack.default
# Unlike a clone, which Inductor takes for an alias of a graph's input even where that is
# overwritten later in the graph.
copy: Callable[[torch.Tensor], torch.Tensor] = torch.ops.tmm.copy.default
