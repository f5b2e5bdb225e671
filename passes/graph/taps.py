"""The marks that tracing left: which tensor is which module's output."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from tmm.core.records import OUTSIDE, Site
from tmm.kernels.ops import MARKS, tap_attention, tap_shown
from tmm.passes.graph.values import module_of, module_stack


def is_mark(node: Node) -> bool:
    """Whether the node is a tap of any kind."""
    return node.op == "call_function" and node.target in MARKS


def site_of(node: Node, modules: Mapping[int, str]) -> Site | None:
    """The site that a tap of a module's tensor marks; None for a module without a name.

    ``modules`` gives the relative name of each module by its ``id``.
    """
    if node.target in (tap_shown, tap_attention):
        identity, path = node.args[-2:]
        if identity == 0:
            return Site(f"{OUTSIDE}{path}", is_shown=True)
        assert isinstance(identity, int)
        name = modules.get(identity)
        return None if name is None else Site(name, str(path), is_shown=True)
    key = call_of(node)
    if key is None:
        return None
    name = modules.get(module_of(key))
    return None if name is None else Site(name, str(node.args[1]))


def call_of(node: Node) -> str | None:
    """The module call that ``node`` was traced in: the module's ``id``, of a repeated call "@n"."""
    return next(reversed(module_stack(node)), None)


def is_within(node: Node, call: str) -> bool:
    """Whether ``node`` was traced in that call of a module, or in a call that it made."""
    return call in module_stack(node)
