"""Forward hooks that are sure to be removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn
from torch.utils.hooks import RemovableHandle

ForwardHook: TypeAlias = Callable[..., Any]
"""Module, positional inputs and output in; None or another output out."""


class HooksManager:
    """One forward hook per module, removed at the end of a ``with`` block or with the manager.

    ``hooks`` maps each module to the handle of its hook.
    """

    def __init__(self) -> None:
        self.hooks: dict[nn.Module, RemovableHandle] = {}

    def register_forward_hook(self, module: nn.Module, hook_fn: ForwardHook) -> None:
        """Hook ``module``, in place of the hook that it has from this manager."""
        self.remove_hook(module)
        self.hooks[module] = module.register_forward_hook(hook_fn)

    def remove_hook(self, module: nn.Module) -> None:
        """Remove the hook of ``module``; nothing happens where it has none from this manager."""
        handle = self.hooks.pop(module, None)
        if handle is not None:
            handle.remove()

    def remove_all_hooks(self) -> None:
        """Remove the hooks of all modules."""
        for module in list(self.hooks):
            self.remove_hook(module)

    def __len__(self) -> int:
        return len(self.hooks)

    def __enter__(self) -> HooksManager:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove_all_hooks()

    # Not weakref.finalize: it would hold the modules, their hooks, and so whatever holds this.
    def __del__(self) -> None:
        self.remove_all_hooks()
