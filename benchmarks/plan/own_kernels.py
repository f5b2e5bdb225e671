"""What tmm's own kernels take: those in Triton, and those that Inductor makes for it.

The code that launches the former runs on tensors of this machine, and its kernels are compiled and
not run. The latter are written for a mocked GPU of the kind.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from benchmarks.mocked_gpu import Chip, plan_of
from benchmarks.plan.account import kernels_of
from benchmarks.plan.resources import Resources, assembled, launched, least
from benchmarks.workloads import FIVE_METRICS
from tmm.core.metrics import METRICS, PAIR_COLUMNS, TENSOR_COLUMNS, builtin_reductions
from tmm.kernels.attention.attention_call import AttentionCall
from tmm.kernels.attention.attention_triton import summarize_attention_with_triton
from tmm.kernels.fused.merge_triton import merge_joined_with_triton
from tmm.kernels.fused.row_partials import FusedRow
from tmm.kernels.summarize import inductor_rows
from tmm.kernels.summarize.group_triton import (
    summarize_group_with_triton,
    summarize_pairs_with_triton,
)

(_FIVE,) = builtin_reductions(FIVE_METRICS, is_complex=False)
(_ALL,) = builtin_reductions(tuple(METRICS), is_complex=False)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Launching:
    """Something that launches a Triton kernel of ``source``, a file below ``tmm/kernels``."""

    name: str
    source: str
    call: Callable[[], object]
    is_quick: bool = False
    """Whether it stands for the others where there is little time."""


def launching() -> list[Launching]:
    """Calls that launch each kernel that tmm has in Triton, in each of its forms."""
    return [*_groups(), *_pairs(), *_merges(), *_attentions()]


def _groups() -> list[Launching]:
    found = []
    for dtype in _DTYPES:
        for with_fourth in (False, True):
            columns = tuple(
                name for name in TENSOR_COLUMNS if with_fourth or name not in ("moment3", "moment4")
            )
            for offset in (0, 1):

                def call(
                    dtype: torch.dtype = dtype,
                    columns: tuple[str, ...] = columns,
                    offset: int = offset,
                ) -> object:
                    tensors = [torch.ones(size, dtype=dtype)[offset:] for size in (70_000, 900)]
                    return summarize_group_with_triton(tensors, columns)

                powers = "four powers" if with_fourth else "two powers"
                lies = "" if not offset else ", not aligned"
                quick = with_fourth and not offset and dtype == torch.bfloat16
                name = f"group: {_name(dtype)}, {powers}{lies}"
                found.append(Launching(name, "summarize/group_triton.py", call, quick))
    return found


def _pairs() -> list[Launching]:
    """A pair by itself, as in a graph, and several of them, as in an update."""
    columns = ("count", "sum_squares", *PAIR_COLUMNS)
    found = []
    for dtype in _DTYPES:
        for number in (1, 2):

            def call(dtype: torch.dtype = dtype, number: int = number) -> object:
                pairs = [(torch.ones(70_000, dtype=dtype),) * 2 for _ in range(number)]
                return summarize_pairs_with_triton(pairs, columns)

            name = f"pairs: {_name(dtype)}, {number}"
            quick = dtype == torch.bfloat16
            found.append(Launching(name, "summarize/group_triton.py", call, quick))
    return found


def _merges() -> list[Launching]:
    def call() -> object:
        row = FusedRow(_ALL.columns, 64, is_wide=False)
        joined = torch.ones(2 * len(row.partials) * 3000)
        return merge_joined_with_triton(joined, None, [3000, 3000], [*row.layout, *row.layout])

    return [Launching("merge of partials", "fused/merge_triton.py", call, is_quick=True)]


def _attentions() -> list[Launching]:
    found = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for channels in (64, 128, 256):
            for kind in ("causal", "boolean mask", "float mask"):
                if channels == 256 and dtype == torch.float32:
                    continue  # torch operations serve it

                def call(
                    dtype: torch.dtype = dtype, channels: int = channels, kind: str = kind
                ) -> object:
                    query = torch.ones(1, 2, 130, channels, dtype=dtype)
                    mask = {
                        "causal": None,
                        "boolean mask": torch.ones(1, 2, 130, 130, dtype=torch.bool),
                        "float mask": torch.ones(1, 2, 130, 130, dtype=dtype),
                    }[kind]
                    return summarize_attention_with_triton(
                        AttentionCall(query, query, mask, 1, kind == "causal", 0.125)
                    )

                quick = channels == 64 and dtype == torch.bfloat16 and kind == "causal"
                name = f"attention: {_name(dtype)}, {channels} channels, {kind}"
                found.append(Launching(name, "attention/attention_triton.py", call, quick))
    return found


def own_resources(chip: Chip, *, quick: bool) -> list[Resources]:
    """Of each kernel and form; ``quick`` takes one of each. After ``mock_gpus`` with this chip."""
    found = []
    for one in launching():
        if one.is_quick or not quick:
            compiled = launched(one.call, chip)
            found += [replace(each, kernel=f"{one.name}: {each.kernel}") for each in compiled]
    for name, key in _reductions(quick=quick).items():
        text = plan_of(lambda key=key: inductor_rows._kernel(*key)).text  # type: ignore[misc]
        for kernel, configurations in assembled(kernels_of(text), chip).items():
            found.append(replace(least(configurations), kernel=f"{name}: {kernel}"))
    return found


def _reductions(
    *, quick: bool
) -> Mapping[str, tuple[tuple[str, ...], torch.dtype, torch.device, bool]]:
    """What ``tmm::summarize`` is compiled for: columns, dtype, device, whether of several rows."""
    device = torch.device("cuda", 0)
    forms = [("five metrics", dtype, True) for dtype in _DTYPES]
    if not quick:
        forms += [("five metrics", torch.bfloat16, False)]
        forms += [("all metrics", dtype, True) for dtype in (torch.bfloat16, torch.float32)]
    columns = {"five metrics": _FIVE.columns, "all metrics": _ALL.columns}
    return {
        f"summarize: {name}, {_name(dtype)}, {'rows' if several else 'one row'}": (
            *(columns[name], dtype, device, several),
        )
        for name, dtype, several in (forms[:1] if quick else forms)
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
