"""Compile the kernels of a CPU, once per machine."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tmm.gaps import levels_to_user

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Those that there are kernels for."""


class _Started:
    """A compilation in a thread, as torch waits for it."""

    def __init__(self, future: Future[None]) -> None:
        self._future, self._process = future, os.getpid()

    def result(self) -> None:
        """Wait, except in a forked child, where no thread goes on.

        Torch then compiles what is not there, so that what went wrong is found anew.
        """
        if os.getpid() == self._process:
            wait([self._future])


@functools.cache
def start_compiling(*sources: str) -> None:
    """Run the compiler in the background, while torch compiles, for ``load_kernels``.

    What goes wrong is left to that. An interpreter that exits waits for the compiler.
    """
    from torch._inductor.codecache import CppCodeCache  # slow to import

    compiler = ThreadPoolExecutor(1, thread_name_prefix="tmm-compiler")
    with suppress(Exception):
        CppCodeCache.load_async(
            _text(sources), submit_fn=lambda work: _Started(compiler.submit(work))
        )
    compiler.shutdown(wait=False)


def load_kernels(
    sources: Sequence[str], argument_types: Sequence[Any], measures: str
) -> dict[torch.dtype, Callable[..., None]]:
    """The functions ``summarize_{dtype}`` of C++ files beside this one, by dtype.

    The files are compiled as one, and may register operators.

    There are none where no C++ compiler works; a warning then tells that what ``measures`` says is
    done by plain torch operations.
    """
    from torch._inductor.codecache import CppCodeCache  # slow to import
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        library = CppCodeCache.load(_text(sources))
    except (CppCompileError, InvalidCxxCompiler, OSError) as error:
        warnings.warn(
            f"tmm {measures} on the CPU with plain torch operations, which is slower, because its "
            f"kernel could not be compiled: {str(error).strip().splitlines()[0]}",
            stacklevel=levels_to_user(),
        )
        return {}
    kernels = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        kernel = getattr(library, f"summarize_{name}")
        kernel.argtypes = list(argument_types)
        kernel.restype = None
        kernels[dtype] = kernel
    return kernels


def _text(sources: Sequence[str]) -> str:
    return "".join(Path(__file__).with_name(source).read_text() for source in sources)
