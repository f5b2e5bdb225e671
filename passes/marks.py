"""The marks that tracing left: which tensor is which module's output."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from tmm.layout import Site
from tmm.operators import tap, tap_value


def is_mark(node: Node) -> bool:
    """Whether the node is a tap of either kind."""
    return node.op == "call_function" and node.target in (tap, tap_value)


def site_of(node: Node, modules: Mapping[int, str]) -> Site | None:
    """The site that a tap of a module's output marks; None for a module without a name here.

    ``modules`` gives the relative name of each module by its ``id``.
    """
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return None
    identity = next(reversed(stack)).partition("@")[0]  # a repeated call is marked with "@n"
    name = modules.get(int(identity))
    return None if name is None else Site(name, str(node.args[1]))
