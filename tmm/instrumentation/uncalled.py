"""Modules of a model that is not compiled, which are to be measured and which nothing calls."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch

from tmm.core.module_names import display_name, is_container
from tmm.instrumentation.apart import apart_from_the_program
from tmm.instrumentation.attribution import Attribution
from tmm.instrumentation.outputs import tensors_in

_MOST_WALKS = 4
"""Passes whose autograd graph is looked through for parameters that are used without a call."""


class Uncalled:
    """Tells why modules have no rows that nobody called; ``ran`` are those that were called.

    ``modules`` are those that are to be measured, with their names.
    """

    def __init__(
        self,
        attribution: Attribution,
        modules: Mapping[torch.nn.Module, str],
        ran: Collection[torch.nn.Module],
    ) -> None:
        self._attribution = attribution
        self._modules = modules
        self._ran = ran
        self._walks = 0
        self._used: set[torch.nn.Module] = set()

    def bypassed(self) -> dict[str, str]:
        """Modules that took part without being called, hence have no rows; with the reason."""
        return {
            display_name(self._modules[module]): reason
            for module in self._uncalled()
            if (reason := self._why_bypassed(module)) is not None
        }

    def idle(self) -> dict[str, str]:
        """The others that were not called so far, with the reason."""
        return {
            display_name(self._modules[module]): self._why_idle(module)
            for module in self._uncalled()
            if self._why_bypassed(module) is None
        }

    def look_through(self, output: object) -> None:
        """Find modules whose parameters a pass used without a call, from what it gave back."""
        if self._walks == _MOST_WALKS or not torch.is_grad_enabled():
            return
        # Those that are tied to a module that was called say nothing of the other one.
        seen = {p for module in self._ran for p in module.parameters(recurse=False)}
        owners = {
            parameter: module
            for module in self._uncalled()
            for parameter in module.parameters(recurse=False)
            if parameter not in seen
        }
        if not owners:
            return
        self._walks += 1
        try:
            with apart_from_the_program():
                used = parameters_behind(tensor for _, tensor in tensors_in(output))
        except RuntimeError:
            return  # a view that must not be used any more
        self._used.update(module for parameter, module in owners.items() if parameter in used)

    def _uncalled(self) -> Iterator[torch.nn.Module]:
        for module in self._modules if self._ran else ():
            if module not in self._ran and not is_container(module):
                yield module

    def _why_bypassed(self, module: torch.nn.Module) -> str | None:
        for outer in self._around(module):
            if isinstance(outer, torch.nn.TransformerEncoderLayer) and not outer.training:
                name = self._attribution.name(outer)
                return f"torch computes {name} as a whole in its fast path, without calling it"
        if module in self._used and self._attention_around(module) is None:
            return (
                "its parameters were used, but no call of it was seen: its forward is called"
                " directly, or by a function that is compiled by itself"
            )
        return None

    def _why_idle(self, module: torch.nn.Module) -> str:
        if (name := self._attention_around(module)) is not None:
            return f"{name} uses its parameters without ever calling it"
        return "it has not run in a monitored step"

    def _attention_around(self, module: torch.nn.Module) -> str | None:
        for outer in self._around(module):
            if isinstance(outer, torch.nn.MultiheadAttention):
                return self._attribution.name(outer)
        return None

    def _around(self, module: torch.nn.Module) -> Iterator[torch.nn.Module]:
        """The modules that ``module`` is in."""
        name = self._modules[module]
        for outer, prefix in self._attribution.names.items():
            if outer is not module and name.startswith(f"{prefix}." if prefix else ""):
                yield outer


def parameters_behind(tensors: Iterable[torch.Tensor]) -> set[torch.Tensor]:
    """The leaves of the autograd graph that computed ``tensors``."""
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen, leaves = set(waiting), set()
    while waiting:
        node = waiting.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(leaf)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves
