"""Rows of partial sums on a GPU, by a kernel that Inductor makes of the plain operations."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import TypeAlias, cast

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tmm.core.inductor_private import compile_fx
from tmm.kernels.dense import flatten
from tmm.kernels.plain_operations import warn_of_plain_operations, why_no_triton
from tmm.kernels.summarize.group import merge_rows
from tmm.kernels.summarize.torch_rows import summarize_rows

Kernel: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

_ROW_LIMIT = 4096  # elements per row: keeps rounding small
_ONE_PROGRAM = 1 << 20  # elements that a single program may read, as that of one long row does

_OWN_SETTINGS = {"triton.cudagraphs": False, "cpp_wrapper": False}
"""What a user's settings for all programs must not make of the kernel: it is called inside of
programs, some of which record CUDA graphs, with sizes that change."""


def summarize_with_inductor(x: torch.Tensor, columns: tuple[str, ...]) -> torch.Tensor | None:
    """The row of a real tensor on an accelerator, by a compiled kernel.

    None without elements, and where the kernel could not be compiled, which is warned of once.
    """
    elements = x.numel()
    if not elements:
        return None
    needed, shapes = _kernels_for(elements, columns)
    kernels = [_kernel(needed, x.dtype, x.device, rows > 1) for rows, _ in shapes]
    flat, parts, start = flatten(x), [], 0
    for kernel, (rows, length) in zip(kernels, shapes, strict=True):
        if kernel is None:
            return None
        parts.append(kernel(flat.narrow(0, start, rows * length).view(rows, length)))
        start += rows * length
    if len(parts) == 1:
        return parts[0]
    owner = torch.zeros(2, dtype=torch.int64, device=x.device)
    return merge_rows(torch.stack(parts), owner, 1, needed)[0, len(needed) - len(columns) :]


def compile_ahead(
    elements: int, columns: tuple[str, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Compile what ``summarize_with_inductor`` needs for such a tensor, if it serves its device."""
    if elements and device.type == "cuda" and why_no_triton(device) is None:
        needed, shapes = _kernels_for(elements, columns)
        for rows, _ in shapes:
            _kernel(needed, dtype, device, rows > 1)


@functools.lru_cache(maxsize=4096)
def _kernels_for(
    elements: int, columns: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """The columns of the kernels, and the shapes (rows, length) that they are called with."""
    rows, length = _row_shape(elements)
    if rows > 1 or length <= _ONE_PROGRAM:
        return columns, ((rows, length),)
    # No divisor is a good length: the last elements are a row of their own.
    needed = columns if "count" in columns else ("count", *columns)  # merging weighs by it
    rows, rest = divmod(elements, _ROW_LIMIT)
    return needed, ((rows, _ROW_LIMIT), (1, rest))


def _row_shape(elements: int) -> tuple[int, int]:
    """Equal rows of at most ``_ROW_LIMIT`` elements where a divisor allows, else one long row."""
    limit = min(elements, _ROW_LIMIT)
    for length in range(limit, limit // 16, -1):
        if elements % length == 0:
            return elements // length, length
    return 1, elements


@functools.cache
def _kernel(
    columns: tuple[str, ...], dtype: torch.dtype, device: torch.device, several_rows: bool
) -> Kernel | None:
    """The kernel for tensors of shape (rows, length) of one dtype; both are dynamic, 1 is not.

    None where it cannot be compiled: for a dtype that the device has not, or for want of a tool.
    Its text names the device. Of a graph that is being traced, or runs, nothing reaches it: it is
    compiled in a thread of its own, without the modes and contexts of this one.
    """
    found: list[Kernel | BaseException] = []

    def work() -> None:
        try:
            found.append(_compile(columns, dtype, device, several_rows))
        except BaseException as error:
            found.append(error)

    with _compiling:
        thread = threading.Thread(target=work, name="tmm-inductor", daemon=True)
        thread.start()
        thread.join()
    (result,) = found
    if isinstance(result, Exception):
        words = str(result).strip() or type(result).__name__
        warn_of_plain_operations(device, f"a kernel was not compiled: {words.splitlines()[0]}")
        return None
    if isinstance(result, BaseException):
        raise result
    return result


_compiling = threading.Lock()
"""Two threads would compile the same, and older Inductors have one set of settings for all."""


def _compile(
    columns: tuple[str, ...], dtype: torch.dtype, device: torch.device, several_rows: bool
) -> Kernel:
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), guard:
        shape = (128 if several_rows else 1, _ROW_LIMIT)
        # Sizes that are symbols, of a tensor that takes no memory.
        sizes = make_fx(lambda x: x, tracing_mode="symbolic")(torch.empty(shape, device="meta"))
        (symbolic,) = (node.meta["val"] for node in sizes.graph.find_nodes(op="placeholder"))
        with symbolic.fake_mode:
            example = torch.empty(symbolic.shape, dtype=dtype, device=device)
        body = functools.partial(summarize_rows, columns)
        graph = make_fx(body, tracing_mode="symbolic")(example)
        (placeholder,) = graph.graph.find_nodes(op="placeholder")
        example = placeholder.meta["val"]
        return cast("Kernel", compile_fx()(graph, [example], config_patches=_OWN_SETTINGS))
