"""The operator ``tmm::summarize_many``: the rows of several small tensors, by one call.

A call takes as long as reading some ten thousand numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tmm.core.metrics import COLUMN_SEPARATOR
from tmm.kernels.dense import packed_dtype, real
from tmm.kernels.summarize.group import summarize_group

_library = torch.library.Library("tmm", "FRAGMENT")
_library.define(
    "summarize_many(Tensor[] tensors, str columns) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)


def _summarize_many(tensors: list[torch.Tensor], columns: str) -> torch.Tensor:
    names = tuple(columns.split(COLUMN_SEPARATOR))
    return summarize_group([real(x) for x in tensors], names).reshape(-1)


def _shape(tensors: list[torch.Tensor], columns: str) -> torch.Tensor:
    length = len(tensors) * (columns.count(COLUMN_SEPARATOR) + 1)
    return tensors[0].new_empty(length, dtype=packed_dtype(tensors[0].device))


# Of a CPU in C++, once that is loaded.
_library.impl("summarize_many", _summarize_many, "CompositeExplicitAutograd")
torch.library.register_fake("tmm::summarize_many", _shape, lib=_library)

summarize_many: Callable[[list[torch.Tensor], str], torch.Tensor] = (
    torch.ops.tmm.summarize_many.default
)
"""Float64 (``packed_dtype``) of shape ``(len(tensors) * columns,)``, row after row.

Args:
    tensors: On one device, of any dtypes and shapes.
    columns: Names from ``TENSOR_COLUMNS``, separated by ``COLUMN_SEPARATOR``.
"""
