"""Shows the calls of modules while the user's own program runs, and leaves no trace otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tmm.core.dynamo_private import skip_code
from tmm.instrumentation.regions import COMPILED_CALL

Left = Callable[[torch.nn.Module, object], None]
"""Is told of a module and what it gave back."""

Around = Callable[[torch.nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Runs the call of a module, with its arguments, and gives its output."""


class ModuleCalls:
    """Shows what modules give back, in the block of ``shown``.

    It stands in the attribute where ``module.compile()`` puts what a call runs. A hook would not
    do: torch's fused layers, and code of users, ask whether there are any, and take another way
    then; and those that users add later would run after it and could change what was measured.
    """

    def __init__(self, left: Left, around: Around | None = None) -> None:
        """With ``around`` calls are made by it, and ``left`` is told of none."""
        self._left = left
        self._around = around
        self._calls: dict[torch.nn.Module, tuple[object, Callable[..., Any]]] = {}
        self._depth = 0

    @contextmanager
    def shown(self, modules: Sequence[torch.nn.Module]) -> Iterator[None]:
        """Show the calls of ``modules`` in the block. Their copies are not shown."""
        self._depth += 1
        try:
            if self._depth == 1:
                self._put(modules)
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._remove()

    def keep_shown(self, modules: Sequence[torch.nn.Module]) -> None:
        """Show the calls of ``modules`` until ``hide``, or the end of a later block."""
        if not self._depth:
            self._put(modules)

    def hide(self) -> None:
        """Show no calls from now on, unless a block of ``shown`` is running."""
        if not self._depth:
            self._remove()

    def _put(self, modules: Sequence[torch.nn.Module]) -> None:
        for module in modules:
            attributes = module.__dict__
            standing = attributes.get(COMPILED_CALL)
            known = self._calls.get(module)
            if known is not None and known[1] is standing:
                continue
            if known is None or known[0] is not standing:
                known = self._calls[module] = standing, self._call(module, standing)
            attributes[COMPILED_CALL] = known[1]

    def _remove(self) -> None:
        for module, (standing, call) in self._calls.items():
            attributes = module.__dict__
            if attributes.get(COMPILED_CALL) is not call:
                continue  # it was compiled, or was not shown
            if standing is None:
                del attributes[COMPILED_CALL]
            else:
                attributes[COMPILED_CALL] = standing

    def _call(self, module: torch.nn.Module, standing: Any) -> Callable[..., Any]:
        run = module._call_impl if standing is None else standing
        left, around = self._left, self._around

        def call(*args: Any, **kwargs: Any) -> Any:
            if around is not None:
                return around(module, run, args, kwargs)
            output = run(*args, **kwargs)
            left(module, output)
            return output

        # What the user compiles calls the module as if nobody looked.
        skip_code(call.__code__)
        inner = getattr(run, "_torchdynamo_inline", run)
        call.__dict__.update(_torchdynamo_inline=inner, _torchdynamo_orig_callable=inner)
        return call

    def forget(self) -> None:
        """Hold no module any more, unless calls are shown."""
        if not self._depth:
            self._calls.clear()
