"""What the kernels of a CPU cost per element, with vectors of every width that can be built here.

    python -m benchmarks.kernels [--rounds 200] [--threads 1] [--quick] [--toy] [--save]

Milliseconds per million elements. Ratios are to ``torch.sum`` of the same tensor, and for attention
to ``scaled_dot_product_attention`` of the same heads, in the same rounds. The tensors fit the
caches, as what a graph has just computed mostly does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated
from unittest import mock

import torch
import typer
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.report import Line, finish, timed
from benchmarks.timing import environment, interleave
from benchmarks.workloads import FIVE_METRICS
from tmm.core.metrics import builtin_reductions
from tmm.kernels.attention import attention_host
from tmm.kernels.attention.choose import summarize_attention
from tmm.kernels.build import VECTORS, compile_variant, instruction_set_of, kernels_of
from tmm.kernels.summarize import host

WIDTHS = (8, 16, 32, 64)
"""Bytes of a vector."""
HEADS, LENGTH, CHANNELS = 4, 1024, 64


def column_sets() -> dict[str, tuple[str, ...]]:
    """What is reduced, by name."""
    (five,) = builtin_reductions(FIVE_METRICS, is_complex=False)
    (kurtosis,) = builtin_reductions((*FIVE_METRICS, "kurtosis"), is_complex=False)
    return {
        "sum of squares": ("sum_squares",),
        "five metrics": five.columns,
        "five metrics and kurtosis": kurtosis.columns,
    }


class Variant:
    """The kernels with vectors of some width."""

    def __init__(self, width: int) -> None:
        library = compile_variant((VECTORS, "summarize/host.cpp"), width)
        self.name = instruction_set_of(library)
        self._kernels = kernels_of(library, host.ARGUMENTS)
        attentions = compile_variant(attention_host.SOURCES, width)
        self._attentions = kernels_of(attentions, attention_host.ARGUMENTS)

    def reduce(self, x: torch.Tensor, columns: tuple[str, ...]) -> Callable[[], None]:
        """A call that reduces a tensor."""
        return lambda: void(host.rows_by(self._kernels[x.dtype], [x], columns))

    def attend(self, query: torch.Tensor, key: torch.Tensor) -> Callable[[], None]:
        """A call that measures an attention, causal."""

        def run() -> None:
            with mock.patch.object(attention_host, "_kernels", return_value=self._attentions):
                summarize_attention(query, key, None, is_causal=True, scale=None)

        return run


def variants() -> list[Variant]:
    """All that the processor can run, the narrowest first."""
    most = {"AVX512": 64, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
    return [Variant(width) for width in WIDTHS if width <= most]


def void(rows: torch.Tensor) -> None:
    """Forget the result."""


def measure(
    baseline: Callable[[], object],
    calls: Mapping[str, Callable[[], None]],
    *,
    elements: int,
    rounds: int,
    what: str,
    note: str,
) -> list[Line]:
    """The lines of the variants of one question; milliseconds are those of a million elements."""
    timings = interleave({note: lambda: void_of(baseline), **calls}, rounds, settle=1)
    lines = [timed(f"{what}, {name}", timings[name], f"x {note}") for name in calls]
    per_million = 1e6 / elements
    return [replace(line, milliseconds=(line.milliseconds or 0) * per_million) for line in lines]


def void_of(call: Callable[[], object]) -> None:
    """Call it and forget the result."""
    call()


@contextmanager
def threads_set(number: int) -> Iterator[None]:
    """Torch with a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    yield
    torch.set_num_threads(before)


def all_lines(elements: int, length: int, rounds: int) -> list[Line]:
    """All lines of the report."""
    lines, built = [], variants()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype)
        for name, columns in column_sets().items():
            lines += measure(
                x.sum,
                {variant.name: variant.reduce(x, columns) for variant in built},
                elements=elements,
                rounds=rounds,
                what=f"{name}, {str(dtype).removeprefix('torch.')}",
                note="torch.sum",
            )
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, HEADS, length, CHANNELS, generator=generator) for _ in range(3)
    )
    lines += measure(
        lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
        {variant.name: variant.attend(query, key) for variant in built},
        elements=HEADS * length * (length + 1) // 2,
        rounds=max(3, rounds // 4),
        what="attention, float32",
        note="scaled_dot_product_attention",
    )
    return lines


def main(
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 200,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    quick: Annotated[bool, typer.Option(help="Few rounds.")] = False,
    toy: Annotated[bool, typer.Option(help="Small tensors: only shows that it runs.")] = False,
    save: Annotated[bool, typer.Option(help="Keep the report in benchmarks/results.")] = False,
) -> None:
    """Measure what the kernels of a CPU cost per element."""
    rounds = 3 if toy else 40 if quick else rounds
    with threads_set(threads):
        lines = all_lines(10_000 if toy else 1 << 20, 128 if toy else LENGTH, rounds)
        where = environment()
    title = f"ms per million elements, {where['device']}, torch {where['torch']}, {threads} threads"
    finish("kernels", "cpu", lines, save=save, title=title, rounds=rounds)


if __name__ == "__main__":
    typer.run(main)
