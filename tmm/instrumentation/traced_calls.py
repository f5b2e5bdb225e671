"""Marks what modules give while Dynamo traces, without hooks, which it would have to trace, too.

Dynamo goes straight to the forward of a module that has no hooks. With one it follows each call
through six functions more, which doubles the time that it takes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch.fx import GraphModule

from tmm.core.dynamo_private import (
    MethodVariable,
    ModuleVariable,
    TensorVariable,
    VariableTracker,
    dynamo_config,
    module_variables,
)
from tmm.core.replacement import Replacement
from tmm.core.torch_private import module_call
from tmm.instrumentation.compile_settings import HAS_ISOLATION
from tmm.instrumentation.outputs import mark_outputs
from tmm.kernels.ops import tap

_STACK = "record_nn_module_stack"


def markable_without_hooks(modules: Iterable[torch.nn.Module]) -> set[torch.nn.Module]:
    """Those of ``modules`` whose forward Dynamo goes straight to, if they have no hooks.

    In the frame of a graph, nodes are said to lie where those of the graph do.
    """
    if not (HAS_ISOLATION or dynamo_config.inline_inbuilt_nn_modules):
        return set()  # always so from torch 2.13 on
    given = set(modules)
    graphs = [module for module in given if isinstance(module, GraphModule)]
    return set(filter(_is_plain, given - {part for graph in graphs for part in graph.modules()}))


def _is_plain(module: torch.nn.Module) -> bool:
    kind = type(module)
    return (
        kind.__call__ is torch.nn.Module.__call__
        and inspect.getattr_static(kind, "_call_impl") is module_call
        and isinstance(inspect.getattr_static(kind, "forward"), FunctionType)
        and not {"forward", "_call_impl", "__call__"} & module.__dict__.keys()
    )


class TracedCalls:
    """Marks the outputs of modules that have no hooks, while it is begun."""

    def __init__(self) -> None:
        self._modules: set[int] = set()
        self._left: tuple[str, object] | None = None  # the call whose module was left last
        self._calls: list[_Call] = []
        self._replaced: list[Replacement] = []

    def begin(self, modules: Iterable[torch.nn.Module]) -> None:
        """Mark what these give from now on."""
        self.end()
        self._modules = set(map(id, modules))
        self._replace(module_variables, _STACK, self._recording)
        self._replace(ModuleVariable, "call_function", self._calling)
        self._replace(MethodVariable, "call_function", self._calling_method)

    def end(self) -> None:
        """Mark nothing any more."""
        while self._replaced:
            self._replaced.pop().restore()
        self._modules.clear()
        self._calls.clear()
        self._left = None

    def _replace(self, owner: Any, name: str, around: Callable[[Any], Any]) -> None:
        self._replaced.append(Replacement(owner, name, around(getattr(owner, name))))

    def _recording(self, own: Any) -> Any:
        @contextmanager
        def record(key: str, source: Any, tracer: Any, module: torch.nn.Module) -> Iterator[None]:
            with own(key, source, tracer, module):
                call = next(reversed(tracer.nn_module_stack.items()))
                yield
            self._left = call

        return record

    def _calling(self, own: Any) -> Any:
        def call_function(
            variable: Any, tracer: Any, arguments: Sequence[Any], keywords: dict[str, Any]
        ) -> Any:
            if not variable.source:
                return own(variable, tracer, arguments, keywords)
            call = _Call(id(variable.value))
            with self._inside(call):
                result = own(variable, tracer, arguments, keywords)
            if call.module in self._modules and not call.is_marked:
                assert self._left is not None
                key, entry = self._left
                tracer.nn_module_stack[key] = entry
                try:
                    _mark(tracer, result)
                finally:
                    del tracer.nn_module_stack[key]
            return result

        return call_function

    def _calling_method(self, own: Any) -> Any:
        """Also where a program calls ``layer.__call__``, which Dynamo takes for any method."""

        def call_function(
            variable: Any, tracer: Any, arguments: Sequence[Any], keywords: dict[str, Any]
        ) -> Any:
            module = variable.obj
            is_call = variable.fn is module_call and isinstance(module, ModuleVariable)
            if not is_call or not module.source:
                return own(variable, tracer, arguments, keywords)
            call = _Call(id(module.value))
            if self._calls and self._calls[-1].module == call.module:
                call, inside = self._calls[-1], nullcontext()
            else:
                source = module.get_nn_module_stack_source()
                record = getattr(module_variables, _STACK)
                inside = record(str(call.module), source, tracer, module.value)
            with inside, self._inside(call):
                result = own(variable, tracer, arguments, keywords)
                if call.module in self._modules:
                    call.is_marked = True
                    _mark(tracer, result)
            return result

        return call_function

    @contextmanager
    def _inside(self, call: _Call) -> Iterator[None]:
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.pop()


@dataclass
class _Call:
    """A call of the module of that ``id``, which is traced now."""

    module: int
    is_marked: bool = False


def _mark(tracer: Any, result: Any) -> None:
    """Mark an output as ``mark_outputs`` does, which Dynamo need not trace for a plain tensor."""
    if type(result) is not TensorVariable or result.requires_grad is None:
        nothing = VariableTracker.build(tracer, None)
        marks = VariableTracker.build(tracer, mark_outputs)
        marks.call_function(tracer, [nothing, nothing, result], {})
        return
    flags = [] if result.requires_grad and torch.is_grad_enabled() else [result.requires_grad]
    if flags:
        flags.append(torch.is_grad_enabled())
    given = [VariableTracker.build(tracer, value) for value in ("", *flags)]
    VariableTracker.build(tracer, tap).call_function(tracer, [result, *given], {})
