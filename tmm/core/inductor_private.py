"""The private names of Inductor that are used: functions, as it takes seconds to import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch


def inductor_config() -> Any:
    """The settings of Inductor, a module."""
    import torch._inductor.config

    return torch._inductor.config


def compile_fx() -> Callable[..., Any]:
    """What compiles a graph for example inputs."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx


def fuse_operator(operator: Callable[..., Any], body: Callable[..., Any]) -> None:
    """Let Inductor compile an operator as the operations of ``body``, which it fuses like others.

    ``body`` is called with a function that applies an operator of ATen, one that gives the values
    of a tensor in half precision as memory holds them, in float32, one that joins contiguous
    tensors, flat, and the operator's arguments.
    """
    from torch._inductor.lowering import lowerings, make_pointwise, register_lowering
    from torch._inductor.virtualized import ops

    def apply(function: Any, *arguments: Any) -> Any:
        return lowerings[function](*arguments)

    def as_stored(x: Any) -> Any:
        # Kernels keep half precision in float32, and take a cast there and back for nothing; but
        # for one to a type that is not the one they compute in.
        stored = x.get_dtype()

        def value(given: Any) -> Any:
            rounded = ops.to_dtype(given, stored, use_compute_types=False)
            return ops.to_dtype(rounded, torch.float32)

        return make_pointwise(value, override_return_dtype=torch.float32)(x)

    def lower(*arguments: Any) -> Any:
        return body(apply, as_stored, _joined, *arguments)

    register_lowering(operator, type_promotion_kind=None)(lower)


def join_in_place(operator: Callable[..., Any]) -> None:
    """Let Inductor join the tensors of a list, flat, where kernels write them: without copies."""
    from torch._inductor.lowering import register_lowering

    register_lowering(operator, type_promotion_kind=None)(_joined)


def _joined(parts: Any) -> Any:
    """What Inductor keeps of tensors, joined flat.

    Inductor does so by itself for ``aten.cat`` of what kernels make, but it pads long rows, and
    copies views and what was made by ``aten.cat``.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    device, dtype = parts[0].get_device(), parts[0].get_dtype()
    total = sum(part.get_numel() for part in parts)
    whole = ir.ConcatKernel(
        name=None, layout=ir.FixedLayout(device, dtype, [total], [1]), inputs=[]
    )
    box = ir.StorageBox(whole)
    pieces, start = [], 0

    def place_of(piece: Any) -> Any:
        nonlocal start
        size = list(piece.get_size())
        strides = ir.FlexibleLayout.contiguous_strides(size)
        place = ir.FixedLayout(device, dtype, size, strides, start)
        start += piece.get_numel()
        return ir.ReinterpretView(data=box, layout=place)

    for part in parts:
        owner = part
        while isinstance(owner, (ir.TensorBox, ir.BaseView)):
            owner = owner.data
        made = owner.data
        if not isinstance(made, ir.ConcatKernel):
            pieces.append(ir.ConcatKernel.realize_into(owner, place_of(owner)))
        elif isinstance(made.layout, ir.NonOwningLayout):
            # The same once more: the kernel that writes a piece of it writes the piece twice, as
            # far as this stands beside it. Nodes that are far apart are not fused.
            for piece in made.inputs:
                again = ir.StorageBox(piece)
                pieces.append(ir.ConcatKernel.realize_into(again, place_of(again)))
                operations = V.graph.operations
                operations.insert(operations.index(piece) + 1, operations.pop())
        else:
            made.layout = ir.NonOwningLayout(place_of(owner))
            pieces.append(made)
    whole.inputs = ir.ConcatKernel.unwrap_storage(pieces)
    whole.name = V.graph.register_buffer(whole)
    V.graph.register_operation(whole)
    return ir.TensorBox(box)


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
