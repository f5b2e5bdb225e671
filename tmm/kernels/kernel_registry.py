"""Which kernel serves an operation on a device: one table, for all operations.

The first one of a device that is available wins; plain torch operations serve everywhere and come
last. ``tmm info`` prints what this says.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch

from tmm.kernels.attention.attention_host import SOURCES as ATTENTION_SOURCES
from tmm.kernels.build import instruction_set, why_not_compiled
from tmm.kernels.plain_operations import warn_of_plain_operations, why_no_triton
from tmm.kernels.summarize.host import SOURCES as HOST_SOURCES

Operation: TypeAlias = Literal[
    "summarize",
    "summarize_group",
    "summarize_pairs",
    "summarize_attention",
    "merge",
    "merge_joined",
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
"""One tensor, many at once, many with what they are compared with, the distributions of an
attention, and partial sums that the compiler has fused, of tensors of their own or in one."""

ANY = "any"
"""Stands for every type of device."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of an operation."""

    operation: Operation
    device: str
    """The type of the devices that it serves, or ``ANY``."""
    language: str
    """What it is written in, for people."""
    function: str
    """``module:function`` below ``tmm.kernels``, imported when it is first needed.

    It returns rows, or None for what it does not serve: a dtype, or anything at all where no
    compiler works.
    """
    package: str | None = None
    """What must be installed."""
    sources: tuple[str, ...] = ()
    """Files in C++ that are compiled for it, once per machine."""


KERNELS = (
    Kernel(
        "summarize",
        "cpu",
        "C++",
        "summarize.host:summarize_one_on_host",
        sources=HOST_SOURCES,
    ),
    Kernel(
        "summarize",
        "cuda",
        "Inductor",
        "summarize.inductor_rows:summarize_with_inductor",
        package="triton",
    ),
    Kernel("summarize", ANY, "torch", "summarize.torch_rows:summarize_with_torch"),
    Kernel(
        "summarize_group",
        "cpu",
        "C++",
        "summarize.group_host:summarize_group_on_host",
        sources=HOST_SOURCES,
    ),
    Kernel(
        "summarize_group",
        "cuda",
        "Triton",
        "summarize.group_triton:summarize_group_with_triton",
        package="triton",
    ),
    Kernel("summarize_group", ANY, "torch", "summarize.group_host:summarize_group_with_torch"),
    Kernel(
        "summarize_pairs",
        "cpu",
        "C++",
        "summarize.group_host:summarize_pairs_on_host",
        sources=HOST_SOURCES,
    ),
    Kernel(
        "summarize_pairs",
        "cuda",
        "Triton",
        "summarize.group_triton:summarize_pairs_with_triton",
        package="triton",
    ),
    Kernel("summarize_pairs", ANY, "torch", "summarize.pair_rows:summarize_pairs_with_torch"),
    Kernel(
        "summarize_attention",
        "cpu",
        "C++",
        "attention.attention_host:summarize_attention_on_host",
        sources=ATTENTION_SOURCES,
    ),
    Kernel(
        "summarize_attention",
        "cuda",
        "Triton",
        "attention.attention_triton:summarize_attention_with_triton",
        package="triton",
    ),
    Kernel(
        "summarize_attention",
        ANY,
        "torch",
        "attention.attention_torch:summarize_attention_with_torch",
    ),
    Kernel("merge", "cpu", "C++", "fused.merge_host:merge_on_host", sources=HOST_SOURCES),
    Kernel("merge", ANY, "torch", "fused.merge_operator:merge_with_torch"),
    Kernel(
        "merge_joined",
        "cuda",
        "Triton",
        "fused.merge_triton:merge_joined_with_triton",
        package="triton",
    ),
    Kernel("merge_joined", ANY, "torch", "fused.merge_operator:merge_joined_with_torch"),
)
"""In the order of preference, the plain torch operations of each operation last."""


def run(operation: Operation, device: torch.device, *arguments: Any) -> torch.Tensor:
    """What the first kernel that serves these arguments gives."""
    for function in _functions(operation, device):
        rows = function(*arguments)
        if rows is not None:
            return rows
    raise AssertionError(f"plain torch operations serve {operation} everywhere")


def candidates(operation: Operation, device_type: str) -> tuple[Kernel, ...]:
    """The kernels whose packages are installed, the one that is tried first in front."""
    return tuple(
        kernel
        for kernel in KERNELS
        if kernel.operation == operation
        and kernel.device in (device_type, ANY)
        and (kernel.package is None or importlib.util.find_spec(kernel.package) is not None)
    )


def chosen(operation: Operation, device_type: str) -> Kernel:
    """The kernel that serves tensors of the usual dtypes, told without compiling anything."""
    return next(
        kernel
        for kernel in candidates(operation, device_type)
        if not kernel.sources or why_not_compiled(kernel.sources) is None
    )


def describe(operation: Operation, device_type: str) -> str:
    """What is chosen, in words: its language, and the vectors that it was compiled for."""
    kernel = chosen(operation, device_type)
    if not kernel.sources:
        return kernel.language
    return f"{kernel.language}, {instruction_set(kernel.sources) or 'compiled when first used'}"


def function_of(kernel: Kernel) -> Callable[..., torch.Tensor | None]:
    """The implementation, imported."""
    module, name = kernel.function.split(":")
    function: Callable[..., torch.Tensor | None]
    function = getattr(importlib.import_module(f"tmm.kernels.{module}"), name)
    return function


@functools.cache
def _functions(
    operation: Operation, device: torch.device
) -> tuple[Callable[..., torch.Tensor | None], ...]:
    reason = why_no_triton(device)
    needs_triton = any(_needs_triton(kernel) and kernel.device == device.type for kernel in KERNELS)
    if reason is not None and needs_triton:
        warn_of_plain_operations(device, reason)
    return tuple(
        function_of(kernel)
        for kernel in candidates(operation, device.type)
        if reason is None or not _needs_triton(kernel)
    )


def _needs_triton(kernel: Kernel) -> bool:
    return kernel.package == "triton"
