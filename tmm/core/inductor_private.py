"""The private names of Inductor that are used: functions, as it takes seconds to import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar


def inductor_config() -> Any:
    """The settings of Inductor, a module."""
    import torch._inductor.config

    return torch._inductor.config


def compile_fx() -> Callable[..., Any]:
    """What compiles a graph for example inputs."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx


@contextmanager
def pending_backwards_as_before() -> Iterator[None]:
    """Forward passes in the block wait for no backward pass, where CUDA graphs are recorded.

    One whose backward never comes would keep the graphs of later steps from beginning anew until
    some other backward has run: they would be taken for what follows it.
    """
    before = {id(m): m.running_forwards_with_pending_backwards for m in _recorders()}
    try:
        yield
    finally:
        for recorder in _recorders():
            pending = before.get(id(recorder), False)
            recorder.running_forwards_with_pending_backwards = pending


def _recorders() -> list[Any]:
    """What records the CUDA graphs of each device, as far as there are any."""
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is None:
        return []
    containers = trees.get_obj(trees.local, "tree_manager_containers").values()
    managers = (getattr(container, "tree_manager", None) for container in containers)
    name = "running_forwards_with_pending_backwards"
    return [manager for manager in managers if hasattr(manager, name)]


def find_compiler() -> None:
    """Raise an error that ``is_missing_compiler`` where there is no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    get_cpp_compiler()


def is_missing_compiler(error: object) -> bool:
    """Whether an error says that there is no C++ compiler."""
    from torch._inductor.exc import InvalidCxxCompiler

    return isinstance(error, InvalidCxxCompiler)


def is_failed_compiler(error: object) -> bool:
    """Whether an error says that the C++ compiler refused a text."""
    from torch._inductor.exc import CppCompileError

    return isinstance(error, CppCompileError)


def cache_folder() -> Path:
    """Where Inductor keeps what it compiled."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def checked_library_cache(check: Callable[[str], None]) -> Any:
    """Inductor's cache of libraries from C++, which ``check``s the path of each that it loads.

    It has ``load(text)``, which gives a ``ctypes.CDLL``, and ``load_async(text, submit_fn)``.
    """
    from torch._inductor.codecache import CppCodeCache
    from torch._inductor.utils import clear_on_fresh_cache

    class CheckedCache(CppCodeCache):
        cache: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]
        cache_clear = staticmethod(cache.clear)

        @staticmethod
        def _load_library_inner(path: str, key: str) -> Any:
            check(path)
            return CppCodeCache._load_library_inner(path, key)

    return clear_on_fresh_cache(CheckedCache)
