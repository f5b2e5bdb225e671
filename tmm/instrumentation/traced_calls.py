"""Marks what modules give while Dynamo traces, without hooks, which it would have to trace, too.

Dynamo goes straight to the forward of a module that has no hooks. With one it follows each call
through six functions more, which doubles the time that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from tmm.instrumentation.compile_settings import HAS_ISOLATION
from tmm.instrumentation.outputs import mark_outputs
from tmm.kernels.ops import tap

_STACK = "record_nn_module_stack"
_CALL_IMPL = torch.nn.Module._call_impl


class TracedCalls:
    """Marks the outputs of modules that have no hooks, while it is begun."""

    def __init__(self) -> None:
        self._modules: set[int] = set()
        self._left: tuple[str, object] | None = None  # the call whose module was left last
        self._marked: list[int] = []  # modules whose call was marked from inside
        self._replaced: list[Replacement] = []

    @staticmethod
    def can_mark(module: torch.nn.Module) -> bool:
        """Whether Dynamo goes straight to the forward of a module that has no hooks of the user."""
        kind = type(module)
        return (
            (HAS_ISOLATION or dynamo_config.inline_inbuilt_nn_modules)  # always, from torch 2.13 on
            and kind.__call__ is torch.nn.Module.__call__
            and kind._call_impl is _CALL_IMPL
            and isinstance(kind.__dict__.get("forward", kind.forward), FunctionType)
            and not {"forward", "_call_impl", "__call__"} & module.__dict__.keys()
            and not isinstance(module, GraphModule)
        )

    def begin(self, modules: Iterable[torch.nn.Module]) -> None:
        """Mark what these give from now on."""
        self.end()
        self._modules = set(map(id, modules))
        if self._modules:
            self._replace(module_variables, _STACK, self._recording)
            self._replace(ModuleVariable, "call_function", self._calling)
            self._replace(MethodVariable, "call_function", self._calling_method)

    def end(self) -> None:
        """Mark nothing any more."""
        while self._replaced:
            self._replaced.pop().restore()
        self._modules.clear()
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
            if id(variable.value) not in self._modules or not variable.source:
                return own(variable, tracer, arguments, keywords)
            self._marked.append(0)
            try:
                result = own(variable, tracer, arguments, keywords)
            finally:
                is_marked = self._marked.pop() == id(variable.value)
            if not is_marked:
                assert self._left is not None
                key, call = self._left
                tracer.nn_module_stack[key] = call
                try:
                    _mark(tracer, result)
                finally:
                    del tracer.nn_module_stack[key]
            return result

        return call_function

    def _calling_method(self, own: Any) -> Any:
        def call_function(
            variable: Any, tracer: Any, arguments: Sequence[Any], keywords: dict[str, Any]
        ) -> Any:
            result = own(variable, tracer, arguments, keywords)
            module = getattr(variable.obj, "value", None)
            if variable.fn is _CALL_IMPL and id(module) in self._modules:
                _mark(tracer, result)
                if self._marked:
                    self._marked[-1] = id(module)
            return result

        return call_function


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
