"""The kernels of a CPU: from the wheel, or compiled once per machine."""

from __future__ import annotations

import ctypes
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tmm.core.failures import levels_to_user
from tmm.core.inductor_private import (
    cache_folder,
    checked_library_cache,
    find_compiler,
    is_failed_compiler,
    is_missing_compiler,
)
from tmm.kernels.ahead import find_ahead, is_ahead
from tmm.kernels.kept_library import find_library, is_kept, keep_library, machine
from tmm.kernels.trusted_files import UntrustedFileError, check_file, check_folder

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Those that there are kernels for."""

VECTORS = "vectors.cpp"
"""What all kernels are compiled together with; it comes first."""


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
    """Run the compiler in the background, while torch compiles, for ``load_library``.

    What goes wrong is left to that. An interpreter that exits waits for the compiler.
    """
    compiler = ThreadPoolExecutor(1, thread_name_prefix="tmm-compiler")
    with suppress(Exception):
        text = text_of(sources)
        if not is_ahead(text) and not is_kept(cache_folder(), text):
            _trusted_cache().load_async(
                _of_this_machine(text), submit_fn=lambda work: _Started(compiler.submit(work))
            )
    compiler.shutdown(wait=False)


def load_library(sources: Sequence[str], measures: str) -> ctypes.CDLL | None:
    """The library of C++ files beside this one, which may register operators.

    A wheel may bring it along. There is none where no C++ compiler works, and where others than
    this user can write to the folder of compiled kernels; a warning then tells that what
    ``measures`` says is done by plain torch operations.
    """
    text = text_of(sources)
    try:
        return _found(text) or _compiled(text)
    except UntrustedFileError as error:
        _warn_of_others(str(error))
        return None
    except Exception as error:
        if not _is_of_compiler(error):
            raise
        warnings.warn(
            f"tmm {measures} on the CPU with plain torch operations, which is slower, because its "
            f"kernel could not be compiled: {str(error).strip().splitlines()[0]}",
            stacklevel=levels_to_user(),
        )
        return None


def kernels_of(
    library: ctypes.CDLL | None, argument_types: Sequence[Any]
) -> dict[torch.dtype, Callable[..., None]]:
    """The functions ``summarize_{dtype}`` of a library, by dtype; none of no library."""
    if library is None:
        return {}
    kernels = {}
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        kernel = getattr(library, f"summarize_{name}")
        kernel.argtypes = list(argument_types)
        kernel.restype = None
        kernels[dtype] = kernel
    return kernels


def instruction_set(sources: Sequence[str]) -> str | None:
    """The vectors that the compiled kernel of these files uses; None before it is compiled."""
    try:
        library = _found(text_of(sources))
    except UntrustedFileError:
        return None
    return None if library is None else instruction_set_of(library)


def instruction_set_of(library: ctypes.CDLL) -> str:
    """The vectors that the kernels of a library use, such as ``AVX2``."""
    library.instruction_set.restype = ctypes.c_char_p
    name: bytes = library.instruction_set()
    return name.decode()


def compile_variant(sources: Sequence[str], vector_bytes: int) -> ctypes.CDLL:
    """The library of files with vectors of 8, 16, 32 or 64 bytes, whatever the processor has.

    For tests and benchmarks; it is in torch's cache afterwards. The files must register nothing.
    """
    definition = f"#define TMM_VECTOR_BYTES {vector_bytes}\n"
    library: ctypes.CDLL = _trusted_cache().load(_of_this_machine(definition + text_of(sources)))
    return library


def why_not_compiled(sources: Sequence[str]) -> str | None:
    """Why there can be no kernel of these files, in a few words; None if there is or may be one.

    Nothing is compiled: a compiler that is there may still fail.
    """
    text = text_of(sources)
    if is_ahead(text):
        return None
    try:
        check_folder(cache_folder())
        if not is_kept(cache_folder(), text):
            find_compiler()
    except Exception as error:
        if not _is_of_compiler(error):
            raise
        return str(error).strip().splitlines()[0]
    return None


def _found(text: str) -> ctypes.CDLL | None:
    """The library of a text that came with the wheel, or that an earlier process has compiled.

    Raises UntrustedFileError.
    """
    return find_ahead(text) or find_library(cache_folder(), text)


def _compiled(text: str) -> ctypes.CDLL:
    """The library of a text, from torch's cache or the compiler, kept for later processes."""
    library: ctypes.CDLL = _trusted_cache().load(_of_this_machine(text))
    keep_library(cache_folder(), text, Path(library._name))
    return library


def _is_of_compiler(error: Exception) -> bool:
    """Whether a library could not be compiled, or not be loaded."""
    return is_missing_compiler(error) or is_failed_compiler(error) or isinstance(error, OSError)


def _trusted_cache() -> Any:
    """Torch's cache of compiled libraries, if its folder and what it loads are this user's own.

    Raises UntrustedFileError, now or when it loads.
    """
    check_folder(cache_folder())
    return _cache_class()


@functools.cache
def _cache_class() -> Any:
    return checked_library_cache(check_file)


@functools.cache
def _warn_of_others(reason: str) -> None:
    """Say it once, of all kernels."""
    warnings.warn(
        "tmm measures on the CPU with plain torch operations, which is slower, because compiled "
        f"kernels could be somebody else's: {reason}. TORCHINDUCTOR_CACHE_DIR names another folder",
        stacklevel=levels_to_user(),
    )


def text_of(sources: Sequence[str]) -> str:
    """C++ files beside this one, as one text."""
    return "".join((Path(__file__).parent / source).read_text() for source in sources)


def _of_this_machine(text: str) -> str:
    """The text with the name of the machine, which torch's own key has not.

    The compiler is told to use all instructions of the processor, and not which these are.
    """
    return f"// {machine()}\n{text}"
