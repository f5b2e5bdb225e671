"""Modules that are called past the model's own forward, such as a head by the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from tmm.core.dynamo_private import skip_code
from tmm.instrumentation.regions import COMPILED_CALL


class OutsideCalls:
    """Shows the outputs of modules that are called while no forward pass of the model runs.

    What shows them stands in an attribute that copies and pickles do not carry, while a step is
    open and at no other time. ``shows`` tells whether a call is to be shown, ``show`` takes module
    and output.
    """

    def __init__(
        self, shows: Callable[[], bool], show: Callable[[torch.nn.Module, object], None]
    ) -> None:
        self._shows = shows
        self._show = show
        self._calls: dict[torch.nn.Module, Callable[..., Any]] = {}
        self._standing: list[tuple[dict[str, Any], Callable[..., Any]]] = []

    def begin(self, modules: Iterable[torch.nn.Module]) -> None:
        """Show calls of ``modules`` from now on."""
        self.end()
        calls, standing = self._calls, self._standing
        for module in modules:
            attributes = module.__dict__
            if attributes.get(COMPILED_CALL) is not None:
                continue
            # The same one in each step: a program that the user compiled may have a guard on it.
            call = calls.get(module)
            if call is None:
                call = calls[module] = _shown(module, self._shows, self._show)
            attributes[COMPILED_CALL] = call
            standing.append((attributes, call))

    def end(self) -> None:
        """Leave the modules as they were, but for what was compiled since."""
        for attributes, call in self._standing:
            if attributes.get(COMPILED_CALL) is call:
                del attributes[COMPILED_CALL]
        self._standing.clear()


def _shown(
    module: torch.nn.Module,
    shows: Callable[[], bool],
    show: Callable[[torch.nn.Module, object], None],
) -> Callable[..., Any]:
    inner: Callable[..., Any] = module._call_impl

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = inner(*args, **kwargs)
        if shows():
            show(module, output)
        return output

    skip_code(forward.__code__)
    # A program of the user that calls the module is traced as it would be without us.
    forward.__dict__.update(_torchdynamo_inline=inner, _torchdynamo_orig_callable=inner)
    return forward
